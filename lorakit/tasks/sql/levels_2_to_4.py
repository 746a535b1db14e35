"""The harder levels of the text-to-SQL task: two conditions, nested queries, joins. Data only, as `level_1`.

A level adds its shapes to those of the levels below it. Joins ask about a table and the one that it is linked to, which
has a row for each word of the column that both share.
"""

from lorakit.tasks.sql import level_1 as words
from lorakit.tasks.sql.level_1 import CITIES, PEOPLE, SURNAMES, Shape, listed

SPICES = listed("Cumin Saffron Paprika Ginger Pepper Mustard Basil Thyme Clove Nutmeg Mint Vanilla")
FLOWERS = listed("Rose Tulip Lily Daisy Orchid Lotus Iris Violet Poppy Jasmine Peony Dahlia")
FOUNDERS = listed("Quinn Nadia Omar Pablo Rosa Stefan Tara Uma Victor Wanda Xenia Yusuf")

# The tables that those of `level_1` are linked to, in their order; the first column is the shared one.
TABLES: dict[str, dict[str, tuple[str, ...] | range]] = {
    "mayors": {"city": CITIES, "mayor": SURNAMES, "citizens": range(100, 9000)},
    "offices": {"department": words.DEPARTMENTS, "boss": SURNAMES, "floor": range(1, 90)},
    "writers": {"author": SURNAMES, "birthplace": CITIES, "prizes": range(0, 99)},
    "filmmakers": {"director": SURNAMES, "hometown": CITIES, "awards": range(0, 99)},
    "clubs": {"team": words.TEAMS, "coach": SURNAMES, "fans": range(100, 9000)},
    "factories": {"brand": words.BRANDS, "plant": CITIES, "workers": range(100, 9000)},
    "airports": {"destination": CITIES, "pilot": PEOPLE, "runways": range(1, 90)},
    "lectures": {"course": words.COURSES, "teacher": SURNAMES, "hours": range(10, 300)},
    "tours": {"town": CITIES, "guide": PEOPLE, "museums": range(1, 90)},
    "singers": {"artist": SURNAMES, "origin": CITIES, "albums": range(1, 90)},
    "banks": {"branch": CITIES, "manager": PEOPLE, "clerks": range(1, 90)},
    "clinics": {"doctor": SURNAMES, "clinic": CITIES, "beds": range(10, 400)},
    "depots": {"station": CITIES, "chief": PEOPLE, "tracks": range(2, 90)},
    "agencies": {"suburb": CITIES, "agent": SURNAMES, "schools": range(1, 90)},
    "kitchens": {"cuisine": words.CUISINES, "spice": SPICES, "stoves": range(1, 60)},
    "nations": {"country": words.COUNTRIES, "flower": FLOWERS, "villages": range(100, 9000)},
    "parks": {"habitat": words.HABITATS, "ranger": FOUNDERS, "hectares": range(100, 9000)},
    "labs": {"maker": words.MAKERS, "founder": FOUNDERS, "patents": range(100, 9000)},
}
LINKS = dict(zip(words.TABLES, TABLES, strict=True))  # table of `level_1` -> the one that it is linked to

TWO_CONDITIONS = (
    Shape(
        "and",
        "SELECT {column} FROM {table} WHERE {text} = '{value}' AND {number} {comparison} {bound}",
        train=(
            "Show the {column} of {table} where {text} is {value} and {number} is {than} {bound}.",
            "List the {column} for {table} with {text} {value} and {number} {than} {bound}.",
            "What is the {column} of the {table} whose {text} is {value} and whose {number} is {than} {bound}?",
            "Which {column} go with {text} {value} and also with {number} {than} {bound}?",
            "Find the {column} if {text} is {value} and {number} is {than} {bound}.",
        ),
        held_out=(
            "Both {text} {value} and {number} {than} {bound} must hold: I want the {column}.",
            "Look in {table} for {text} {value}, keep those {than} {bound} in {number}, print the {column}.",
            "Please print {column} from {table}: {text} equals {value}, {number} {than} {bound}, both.",
        ),
    ),
    Shape(
        "or",
        "SELECT {column} FROM {table} WHERE {text} = '{value}' OR {number} {comparison} {bound}",
        train=(
            "Show the {column} of {table} where {text} is {value} or {number} is {than} {bound}.",
            "List the {column} for {table} with {text} {value} or {number} {than} {bound}.",
            "What is the {column} of the {table} whose {text} is {value} or whose {number} is {than} {bound}?",
            "Which {column} go with {text} {value} or else with {number} {than} {bound}?",
            "Find the {column} if {text} is {value} or {number} is {than} {bound}.",
        ),
        held_out=(
            "Either {text} {value} or {number} {than} {bound} will do: I want the {column}.",
            "Look in {table} for {text} {value}, add those {than} {bound} in {number}, print the {column}.",
            "Please print {column} from {table}: {text} equals {value}, {number} {than} {bound}, or both.",
        ),
    ),
    Shape(
        "aggregate_where",
        "SELECT {function}({number}) FROM {table} WHERE {text} = '{value}'",
        train=(
            "What is the {stat} {number} of {table} with {text} {value}?",
            "Show the {stat} {number} of all {table} where {text} is {value}.",
            "Find the {stat} {number} in {table} whose {text} is {value}.",
            "Compute the {stat} {number} for {table} if {text} is {value}.",
            "Give me the {stat} {number} for {text} {value}.",
        ),
        held_out=(
            "Tell me, over {table} that have {text} {value}, the {stat} {number}.",
            "I want to know which {stat} {number} belongs to {text} {value}.",
            "Please take only {text} {value} and print the {stat} {number}.",
        ),
    ),
    Shape(
        "having",
        "SELECT {text} FROM {table} GROUP BY {text} HAVING {function}({number}) {comparison} {bound}",
        train=(
            "Which {text} have a {stat} {number} {than} {bound}?",
            "Show every {text} of {table} whose {stat} {number} is {than} {bound}.",
            "List each {text} in {table} with a {stat} {number} {than} {bound}.",
            "Find the {text} where the {stat} {number} is {than} {bound}.",
            "What are the {text} of {table} that have a {stat} {number} {than} {bound}?",
        ),
        held_out=(
            "Per {text}, work out the {stat} {number} and keep those {than} {bound}.",
            "I want each {text} if its {table} reach a {stat} {number} {than} {bound}.",
            "Please group by {text} and print those {than} {bound} in {stat} {number}.",
        ),
    ),
)
NESTED = (
    Shape(
        "than_average",
        "SELECT {column} FROM {table} WHERE {number} {comparison} (SELECT AVG({number}) FROM {table})",
        train=(
            "Show the {column} of {table} where {number} is {than} average.",
            "List the {column} for {table} with {number} {than} the average {number}.",
            "What is the {column} of the {table} whose {number} is {than} the average?",
            "Which {column} have {number} {than} average?",
            "Find the {column} if {number} is {than} the average of all {table}.",
        ),
        held_out=(
            "I want to see {column} for those {than} the mean in {number}.",
            "Take the average {number} of {table} and print the {column} of those {than} it.",
            "Please print {column}: {number} {than} what {table} have on average.",
        ),
    ),
    Shape(
        "than_group",
        "SELECT {column} FROM {table} WHERE {number} {comparison} "
        "(SELECT {function}({number}) FROM {table} WHERE {text} = '{value}')",
        train=(
            "Show the {column} of {table} where {number} is {than} the {stat} {number} for {text} {value}.",
            "List the {column} for {table} with {number} {than} the {stat} of {text} {value}.",
            "What is the {column} of the {table} whose {number} is {than} the {stat} {number} of {text} {value}?",
            "Which {column} have {number} {than} the {stat} {number} with {text} {value}?",
            "Find the {column} if {number} is {than} the {stat} {number} where {text} is {value}.",
        ),
        held_out=(
            "Take the {stat} {number} of {text} {value}: I want the {column} of all {table} {than} that.",
            "Look for {text} {value}, get its {stat} {number}, and print {column} of those {than} it.",
            "Please print {column} from {table}; {number} must be {than} {value} has as {stat} by {text}.",
        ),
    ),
    Shape(
        "same_group",
        "SELECT {column} FROM {table} WHERE {text} IN (SELECT {text} FROM {table} WHERE {number} {comparison} {bound})",
        train=(
            "Show the {column} of {table} that share a {text} with one whose {number} is {than} {bound}.",
            "List the {column} for every {text} in which some {table} have {number} {than} {bound}.",
            "What is the {column} of all {table} whose {text} has any {number} {than} {bound}?",
            "Which {column} belong to a {text} with some {number} {than} {bound}?",
            "Find the {column} where the same {text} has a {number} {than} {bound}.",
        ),
        held_out=(
            "Collect each {text} that has {number} {than} {bound} once, then print {column} for all of them.",
            "I want {column} of everything in any {text} where one of the {table} is {than} {bound} in {number}.",
            "Please take every {text} reaching {number} {than} {bound} and print the whole {column}.",
        ),
    ),
    Shape(
        "count_than_average",
        "SELECT COUNT(*) FROM {table} WHERE {number} {comparison} "
        "(SELECT AVG({number}) FROM {table} WHERE {text} = '{value}')",
        train=(
            "How many {table} have {number} {than} the average for {text} {value}?",
            "Count the {table} where {number} is {than} the average {number} of {text} {value}.",
            "What is the number of {table} with {number} {than} the average of {text} {value}?",
            "Give me the count of {table} with {number} {than} average for {text} {value}.",
            "How many rows have {number} {than} the average {number} where {text} is {value}?",
        ),
        held_out=(
            "Take the mean {number} of {text} {value} and tell me how many {table} are {than} that.",
            "I want to know the number of all {table} {than} {text} {value} in average {number}.",
            "Please count each one {than} what {text} {value} has as mean {number}.",
        ),
    ),
)
JOINED = (
    Shape(
        "join_text",
        "SELECT {column} FROM {table} JOIN {other} USING ({key}) WHERE {mark} = '{label}'",
        train=(
            "Show the {column} of {table} where the {mark} is {label}.",
            "List the {column} for {table} with {mark} {label}.",
            "What is the {column} of the {table} whose {mark} is {label}?",
            "Which {column} go with the {mark} {label}?",
            "Find the {column} if the {mark} is {label}.",
        ),
        held_out=(
            "I want the {column} of all {table} that have {label} as {mark}.",
            "Look for {mark} {label} and print the {column}.",
            "Please print {column} from {table} if {mark} equals {label}.",
        ),
    ),
    Shape(
        "join_number",
        "SELECT {column} FROM {table} JOIN {other} USING ({key}) WHERE {size} {comparison} {least}",
        train=(
            "Show the {column} of {table} where {size} is {than} {least}.",
            "List the {column} for {table} with {size} {than} {least}.",
            "What is the {column} of the {table} whose {size} is {than} {least}?",
            "Which {column} have {size} {than} {least}?",
            "Find the {column} if {size} is {than} {least}.",
        ),
        held_out=(
            "I want the {column} of all {table} that have {size} {than} {least}.",
            "Look in {table} for {size} {than} {least} and print the {column}.",
            "Please print {column} from {table} if {size} is {than} {least}.",
        ),
    ),
    Shape(
        "join_count",
        "SELECT COUNT(*) FROM {table} JOIN {other} USING ({key}) WHERE {mark} = '{label}' AND {number} {comparison} "
        "{bound}",
        train=(
            "How many {table} with {number} {than} {bound} have {mark} {label}?",
            "Count the {table} where {mark} is {label} and {number} is {than} {bound}.",
            "What is the number of {table} with {mark} {label} and {number} {than} {bound}?",
            "Give me the count of {table} with {mark} {label} and {number} {than} {bound}.",
            "How many rows have {mark} {label} and {number} {than} {bound}?",
        ),
        held_out=(
            "Tell me how many {table} there are {than} {bound} in {number} if {label} is the {mark}.",
            "I want to know how often {mark} equals {label} in {table} {than} {bound} by {number}.",
            "Please count every row whose {mark} is {label}, but {number} {than} {bound} only.",
        ),
    ),
    Shape(
        "join_group",
        "SELECT {mark}, {function}({number}) FROM {table} JOIN {other} USING ({key}) GROUP BY {mark}",
        train=(
            "What is the {stat} {number} per {mark}?",
            "Show the {stat} {number} of {table} for each {mark}.",
            "Find the {stat} {number} by {mark}.",
            "Compute the {stat} {number} for every {mark}.",
            "For each {mark}, give me the {stat} {number}.",
        ),
        held_out=(
            "Tell me the {stat} {number} in each {mark}.",
            "I want to know the {stat} {number} of {table}, per {mark}.",
            "Please group by {mark} and print the {stat} {number}.",
        ),
    ),
)
LEVELS = (words.SHAPES, TWO_CONDITIONS, NESTED, JOINED)
