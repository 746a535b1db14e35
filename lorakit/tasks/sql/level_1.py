"""What the text-to-SQL task talks about: tables, values, query shapes and phrasings. Data only.

`questions` combines it.

These are the shapes of level 1, one table and at most one condition; those of the harder levels are in `levels_2_to_4`.
"""

from dataclasses import dataclass


def listed(text: str) -> tuple[str, ...]:
    """The words of a text with blanks between them."""
    return tuple(text.split())


PEOPLE = listed("Anna Ben Carla David Emma Felix Grace Hugo Ivan Julia Karim Laura")
SURNAMES = listed("Adams Baker Clark Dixon Evans Foster Garcia Hughes Irving Jensen Kumar Lopez")
CITIES = listed("Oslo Rome Paris Lima Cairo Tokyo Delhi Berlin Madrid Dublin Seoul Vienna")
DEPARTMENTS = listed("Sales Legal Finance Support Research Design Security Marketing Payroll Training Quality Press")
BOOKS = listed("Dawn Ashes Voyage Mirror Harvest Orchard Silence Lantern Thunder Compass Island Winter")
FILMS = listed("Gravity Phantom Runaway Outlaw Comet Stranger Vertigo Avalanche Mirage Castaway Eclipse Rebel")
TEAMS = listed("Lions Tigers Bears Eagles Sharks Wolves Hawks Bulls Rockets Pirates Kings Giants")
CARS = listed("Polo Golf Civic Corolla Focus Fiesta Panda Astra Clio Swift Leaf Mustang")
BRANDS = listed("Toyota Honda Ford Fiat Opel Renault Nissan Volvo Mazda Skoda Tesla Audi")
AIRLINES = listed("Delta United Iberia Qantas Emirates Finnair Swiss Ryanair Condor Avianca Garuda Luxair")
COURSES = listed("Algebra History Biology Physics Music Drama Latin Chemistry Geography Logic Ethics Poetry")
HOTELS = listed("Plaza Ritz Savoy Astoria Palace Bellevue Central Royal Metropol Excelsior Riviera Regent")
SONGS = listed("Hello Yesterday Imagine Angie Jolene Valerie Roxanne Fever Crazy Respect Halo Umbrella")

DISHES = listed("Soup Pizza Curry Salad Stew Pasta Tacos Risotto Omelette Pie Sushi Burger")
CUISINES = listed("Thai Greek French Indian Mexican Korean Turkish Spanish Lebanese Polish Chinese Cuban")
RIVERS = listed("Nile Congo Rhine Volga Thames Ganges Amazon Jordan Hudson Seine Tiber Indus")
COUNTRIES = listed("Egypt Austria Brazil Canada Kenya Norway Peru Japan Chad Italy Chile Ghana")
SPECIES = listed("Otter Zebra Horse Camel Falcon Beaver Sheep Goat Rabbit Moose Monkey Turtle")
HABITATS = listed("Desert Forest Swamp Tundra Savanna Jungle Mountain Coast Meadow Reef Steppe Cave")
PHONES = listed("Pixel Galaxy Nova Spark Moto Edge Prime Zoom Flip Echo Wave Pulse")
MAKERS = listed("Nokia Sony Google Samsung Intel Motorola Lenovo Apple Philips Panasonic Siemens Sharp")

# Column -> its words (a text column) or its range (a column of whole numbers). Of twelve words the last four, and of
# all numbers those that leave HELD_OUT_REMAINDER after division by five, occur in no training question.
TABLES: dict[str, dict[str, tuple[str, ...] | range]] = {
    "orders": {"customer": PEOPLE, "city": CITIES, "price": range(20, 900), "qty": range(1, 90)},
    "employees": {"name": PEOPLE, "department": DEPARTMENTS, "salary": range(900, 5000), "age": range(18, 80)},
    "books": {"title": BOOKS, "author": SURNAMES, "pages": range(80, 900), "year": range(1900, 2020)},
    "movies": {"film": FILMS, "director": SURNAMES, "minutes": range(60, 240), "budget": range(5, 300)},
    "players": {"player": PEOPLE, "team": TEAMS, "goals": range(0, 99), "games": range(10, 400)},
    "cars": {"model": CARS, "brand": BRANDS, "power": range(40, 400), "mileage": range(1000, 9000)},
    "flights": {"airline": AIRLINES, "destination": CITIES, "distance": range(200, 9000), "seats": range(40, 500)},
    "students": {"student": PEOPLE, "course": COURSES, "score": range(0, 100), "credits": range(10, 240)},
    "hotels": {"hotel": HOTELS, "town": CITIES, "rooms": range(10, 400), "rate": range(40, 600)},
    "songs": {"song": SONGS, "artist": SURNAMES, "seconds": range(90, 500), "plays": range(100, 9000)},
    "loans": {"client": SURNAMES, "branch": CITIES, "amount": range(100, 9000), "months": range(6, 240)},
    "patients": {"patient": PEOPLE, "doctor": SURNAMES, "height": range(90, 210), "visits": range(1, 80)},
    "trains": {"driver": SURNAMES, "station": CITIES, "speed": range(60, 400), "wagons": range(2, 90)},
    "houses": {"owner": PEOPLE, "suburb": CITIES, "area": range(40, 400), "taxes": range(100, 3000)},
    "recipes": {"dish": DISHES, "cuisine": CUISINES, "calories": range(100, 900), "servings": range(1, 60)},
    "rivers": {"river": RIVERS, "country": COUNTRIES, "length": range(200, 7000), "depth": range(2, 120)},
    "animals": {"species": SPECIES, "habitat": HABITATS, "weight": range(1, 900), "lifespan": range(2, 70)},
    "phones": {"phone": PHONES, "maker": MAKERS, "battery": range(900, 7000), "storage": range(16, 512)},
}
UNSEEN_TABLES = ("recipes", "rivers", "animals", "phones")
LIMITS = (2, 3, 4, 5, 6, 7, 8, 9, 10)
HELD_OUT_REMAINDER = 3

# SQL -> the words for it in a question
COMPARISONS = {">": ("over", "more than"), "<": ("under", "less than")}
FUNCTIONS = {
    "AVG": ("average",),
    "SUM": ("total",),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
}


@dataclass(frozen=True)
class Shape:
    """One kind of query: its SQL, the phrasings used in training, and those that only the phrasings split uses.

    The names in braces are slots: {table}, {column} (one to show), {text} and {value} (a text column and one of its
    words), {number} and {bound} (a numeric column and a threshold), {limit} (a number of rows), {comparison} with its
    words {than}, {function} with its words {stat}.
    """

    name: str
    sql: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


SHAPES = (
    Shape(
        "where_text",
        "SELECT {column} FROM {table} WHERE {text} = '{value}'",
        train=(
            "Show the {column} of {table} where {text} is {value}.",
            "List the {column} for {table} with {text} {value}.",
            "What is the {column} of the {table} whose {text} is {value}?",
            "Which {column} go with {text} {value}?",
            "Find the {column} if {text} is {value}.",
        ),
        held_out=(
            "I want the {column} of all {table} that have {text} {value}.",
            "Look in {table} for {text} {value} and print the {column}.",
            "Please print {column} from {table} if {text} equals {value}.",
        ),
    ),
    Shape(
        "where_number",
        "SELECT {column} FROM {table} WHERE {number} {comparison} {bound}",
        train=(
            "Show the {column} of {table} where {number} is {than} {bound}.",
            "List the {column} for {table} with {number} {than} {bound}.",
            "What is the {column} of the {table} whose {number} is {than} {bound}?",
            "Which {column} have {number} {than} {bound}?",
            "Find the {column} if {number} is {than} {bound}.",
        ),
        held_out=(
            "I want the {column} of all {table} that have {number} {than} {bound}.",
            "Look in {table} for {number} {than} {bound} and print the {column}.",
            "Please print {column} from {table} if {number} is {than} {bound}.",
        ),
    ),
    Shape(
        "count",
        "SELECT COUNT(*) FROM {table}",
        train=(
            "How many {table} are there?",
            "Count the {table}.",
            "What is the number of {table}?",
            "Give me the count of all {table}.",
            "How many rows does {table} have?",
        ),
        held_out=(
            "Tell me how many {table} we have.",
            "I want to know the number of all {table}.",
            "Please count every row of {table}.",
        ),
    ),
    Shape(
        "count_where",
        "SELECT COUNT(*) FROM {table} WHERE {text} = '{value}'",
        train=(
            "How many {table} have {text} {value}?",
            "Count the {table} where {text} is {value}.",
            "What is the number of {table} with {text} {value}?",
            "Give me the count of {table} with {text} {value}.",
            "How many rows have {text} {value}?",
        ),
        held_out=(
            "Tell me how many {table} there are with {text} {value}.",
            "I want to know the number of {table} whose {text} is {value}.",
            "Please count every row of {table} if {text} equals {value}.",
        ),
    ),
    Shape(
        "aggregate",
        "SELECT {function}({number}) FROM {table}",
        train=(
            "What is the {stat} {number} of {table}?",
            "Show the {stat} {number} of all {table}.",
            "Find the {stat} {number} in {table}.",
            "Compute the {stat} {number} for {table}.",
            "Give me the {stat} {number}.",
        ),
        held_out=(
            "Tell me the {stat} {number} over all {table}.",
            "I want to know the {stat} {number} in the table {table}.",
            "Please print the {stat} {number} from {table}.",
        ),
    ),
    Shape(
        "group",
        "SELECT {text}, {function}({number}) FROM {table} GROUP BY {text}",
        train=(
            "What is the {stat} {number} per {text}?",
            "Show the {stat} {number} of {table} for each {text}.",
            "Find the {stat} {number} by {text}.",
            "Compute the {stat} {number} for every {text}.",
            "For each {text}, give me the {stat} {number}.",
        ),
        held_out=(
            "Tell me the {stat} {number} in each {text}.",
            "I want to know the {stat} {number} of {table}, per {text}.",
            "Please group by {text} and print the {stat} {number}.",
        ),
    ),
    Shape(
        "top",
        "SELECT {column} FROM {table} ORDER BY {number} DESC LIMIT {limit}",
        train=(
            "Show the {column} of the {limit} {table} with the highest {number}.",
            "List the {column} of the top {limit} {table} by {number}.",
            "Which {column} have the {limit} highest {number}?",
            "What is the {column} of the {limit} {table} with the most {number}?",
            "Give me the {column} for the {limit} highest {number}.",
        ),
        held_out=(
            "Of all {table}, tell me the {column} with the {limit} highest {number}.",
            "Who is in the top {limit} by {number}? Show the {column}.",
            "Please print the {column} for the most {number}, {limit} rows.",
        ),
    ),
    Shape(
        "distinct",
        "SELECT DISTINCT {text} FROM {table}",
        train=(
            "What are the distinct {text} of {table}?",
            "List the different {text} in {table}.",
            "Show every unique {text} of {table}.",
            "Which different {text} do the {table} have?",
            "Give me all distinct {text}.",
        ),
        held_out=(
            "Tell me which distinct {text} there are in {table}.",
            "I want to know every different {text}.",
            "Please print all unique {text} from {table}.",
        ),
    ),
)
