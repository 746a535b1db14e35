"""The tables of the task's second edition: 3 to 7 columns, names of one word and of several, ranges wide and narrow.

Data only. Three sets of tables share no table name, no column name and no word: those of training, of \
`validation`, and
of the split `tables`. None of the names is one of the stranger's.
"""

from lorakit.tasks.sql.rows import Columns

# Pool -> its words, for text columns. The split `values` uses the last third of a pool, all others the rest.
TRAIN_POOLS = """
given: Amy, Bruno, Chloe, Derek, Elsa, Frank, Gina, Hassan, Irene, Jonas, Kira, Leo
family: Abbot, Barnes, Chen, Doyle, Eaton, Flores, Gupta, Haynes, Ito, Jacobs, Klein, Lang
whole: Ann Archer, Bob Bishop, Cleo Cross, Dan Drew, Eve East, Finn Field, Gus Gray, Hal Hunt, Ivy Ives, Jan Joyce
cities: Athens, Boston, Chicago, Denver, Geneva, Havana, Jakarta, Kyoto, Leeds, Milan, Naples, Osaka
places: Cape Town, Hong Kong, Los Angeles, New Delhi, San Diego, Tel Aviv, Buenos Aires, Santa Fe, Abu Dhabi
countries: Belgium, Cuba, Denmark, Ecuador, Finland, Greece, Hungary, Iceland, Kuwait, Laos, Mexico, Nepal
streets: Elm Road, Oak Lane, High Street, Mill Lane, Station Road, Park Avenue, King Street, Bay View, Hill Top
divisions: Accounting, Catering, Logistics, Transport, Planning, Engineering, Purchasing, Housing, Editing
posts: Typist, Driver, Welder, Midwife, Baker, Plumber, Painter, Tailor, Usher, Butcher, Cashier, Librarian
states: open, closed, pending, blocked, cancelled, paid, returned, expired, archived
urgencies: low, normal, urgent, critical, minor, severe
plans: Basic, Premium, Family, Student, Senior, Weekend, Gold, Silver, Trial
colours: blue, brown, pink, purple, beige, violet, maroon, golden, navy
sizes: small, medium, large, tiny, huge, slim
fabrics: cotton, linen, wool, silk, denim, leather, velvet, nylon, felt
woods: pine, cedar, spruce, walnut, teak, bamboo, cherry, ebony, maple
fruits: apple, pear, mango, plum, peach, lemon, banana, fig, kiwi
drinks: cola, tea, coffee, cocoa, cider, lemonade, water, juice, milk
meals: fish pie, beef stew, pea soup, egg rice, apple tart, bean salad, corn bread, lamb roast, goat curry
animals: cat, dog, gecko, hamster, pony, lizard, snake, ferret, canary
breeds: Poodle, Beagle, Collie, Terrier, Boxer, Husky, Pug, Spaniel, Dachshund
illnesses: flu, asthma, measles, anaemia, migraine, eczema, malaria, mumps, gout
drugs: Aspirin, Insulin, Morphine, Heparin, Codeine, Quinine, Zinc, Iodine, Lithium
wards: Ward A, Ward B, Ward C, Ward D, Ward E, Ward F
teams: Red Foxes, Blue Owls, Green Bulls, Black Cats, White Swans, Gold Rams, Wild Geese, Iron Bears, Sea Dogs
rivals: City Kings, Port Lions, Steel Wolves, Snow Hawks, River Sharks, Royal Eagles, Desert Rats, Storm Crows
sports: tennis, rugby, hockey, boxing, judo, rowing, cycling, fencing, archery
genres: comedy, horror, western, thriller, romance, fantasy, documentary, musical, crime
titles: Blue Door, Cold Star, Last Ferry, Old Bridge, Quiet Road, Second Sun, Tall Grass, White Night, Long Winter
papers: Herald, Tribune, Gazette, Courier, Examiner, Chronicle, Monitor, Telegraph, Standard
languages: Arabic, Dutch, English, Hindi, Italian, Korean, Swahili, Urdu, Welsh
tongues: Finnish, Greek, Hebrew, Latin, Polish, Russian, Turkish, Zulu, Basque
subjects: maths, botany, law, optics, rhetoric, geology, anatomy, grammar, sociology
schools: North High, South High, East Side, West Point, Lake View, River Bank, Sun Hill, Green Hall, Stone Gate
engines: petrol, diesel, electric, hybrid, steam, gas
vehicles: Van, Truck, Bus, Tram, Scooter, Tractor, Ferry, Taxi, Barge
carriers: AirOne, BlueJet, CloudAir, DayFly, EastWing, FlyNow, GoSky, HighAir, JetSet
codes: K1, K2, K3, K4, K5, K6, M1, M2, M3
months: January, February, March, April, June, July, August, October, December
days: Monday, Tuesday, Wednesday, Thursday, Saturday, Sunday
weathers: sunny, rainy, foggy, windy, snowy, cloudy
metals: iron, copper, nickel, lead, tin, chrome, brass, titanium, platinum
planets: Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune, Pluto, Ceres
phones: Orbit, Lumen, Vertex, Quartz, Nimbus, Zenith, Aurora, Cosmos, Photon
roles: admin, editor, viewer, owner, guest, tester
payments: cash, card, cheque, voucher, transfer, credit
minerals: quartzite, granite, marble, basalt, slate, chalk, flint, gypsum, topaz
crops: wheat, barley, maize, oats, rye, soy, potato, cabbage, onion
instruments: violin, cello, flute, harp, tuba, oboe, drum, guitar, banjo
hotels: Grand Inn, Sea Lodge, Hill House, Lake Resort, Star Motel, Oak Manor, Sky Tower, Moon Court, Garden Suites
"""

TRAIN_TABLES = """
workers: worker=given, division=divisions, wage=900-6000, shifts=1-40
tickets: requester=given, ticket_state=states, urgency=urgencies, hours_open=1-300
departures: carrier=carriers, gate=codes, delay_minutes=0-180, passengers=20-400
apartments: street=streets, landlord=family, bedrooms=1-8, monthly_rent=300-4000, floor_area=20-300
gym_members: member_name=whole, plan=plans, join_year=1998-2024, visit_count=0-300
shirts: fabric=fabrics, shade=colours, shirt_size=sizes, stock=0-500, sale_price=5-90
parcels: sender=family, parcel_state=states, destination_city=places, weight_grams=50-9000, insured_value=10-2000
pets: animal=animals, pet_owner=whole, birth_year=2005-2023
dogs: breed=breeds, handler=given, shoulder_height=15-90, litter_size=1-12
prescriptions: drug=drugs, doctor_name=family, dose_mg=5-900, refills=0-12
admissions: illness=illnesses, ward=wards, nights=1-60, patient_age=1-99, bill=50-9000
athletes: athlete=whole, sport=sports, nation=countries, medals=0-25, world_rank=1-400
fixtures: home_team=teams, away_team=rivals, home_score=0-14, away_score=0-14, spectators=100-9000
films: film_title=titles, category=genres, running_time=60-210, release_year=1950-2024, rating=1-10
articles: paper=papers, reporter=family, word_count=100-5000, comment_count=0-900
translators: translator=given, source_language=languages, target_language=tongues, rate_per_page=5-120
exams: pupil=given, subject=subjects, mark=0-100, attempts=1-9
classrooms: school=schools, teacher=family, desks=8-60, windows_count=0-15
rentals: vehicle=vehicles, engine=engines, daily_rate=15-500, kilometres=10-9000, renter=whole
buses: line_code=codes, depot_city=cities, stops=4-80, seats_total=12-120
forecasts: forecast_day=days, place=places, weather=weathers, high_temp=0-45, wind_speed=0-150
alloys: base_metal=metals, hardness=1-100, melting_point=200-3500
moons: planet=planets, discovery_year=1610-2020, diameter_km=5-5300, orbit_days=1-900
phones_sold: phone=phones, market_country=countries, units_sold=10-9000, battery_hours=4-60, screen_inches=4-9
accounts: account_holder=whole, role=roles, login_count=0-5000, storage_mb=10-9000
sales: salesperson=given, payment_method=payments, sale_month=months, revenue=20-9900
quarries: rock=minerals, quarry_owner=family, depth_metres=5-400, output_tons=100-9000
farms: crop=crops, farmer=family, hectares=1-900, yield_tons=1-5000, tractors_owned=0-15
orchards: fruit=fruits, orchard_city=cities, tree_count=20-5000, picked_kg=50-9000
menu_items: meal=meals, chef=given, menu_price=4-60, calories_count=90-1500
cafes: beverage=drinks, cafe_city=cities, cups_sold=10-3000
concerts: instrument=instruments, performer=whole, hall_city=places, audience=50-9000, encores=0-6
bookings: hotel_name=hotels, guest_country=countries, nights_booked=1-30, room_rate=40-900, adults=1-6, \
booking_state=states
furniture: wood=woods, carpenter=family, width_cm=20-300, height_cm=20-250, list_price=30-4000
job_ads: post=posts, job_city=cities, hourly_wage=8-90, openings=1-50
elections: candidate=whole, district=schools, votes=50-9900, campaign_budget=100-9000
library_loans: borrower=given, loan_language=languages, loan_days=1-90, fines=0-200
inventory: item_code=codes, material=metals, storage_city=places, on_hand=0-900, reorder_level=1-100, shelf=1-40
subscriptions: subscriber=whole, tier=plans, start_month=months, renewals=0-24, monthly_fee=3-120, \
payment_type=payments
shipments: shipper=family, origin_country=countries, cargo=crops, crates=1-900, freight_charge=50-9900, \
customs_days=0-30, urgency_level=urgencies
hospitals: clinic_city=cities, head_nurse=given, beds=4-300, waiting_weeks=0-52, opening_year=1930-2022, \
main_drug=drugs, budget_thousands=50-9000
museums: museum_city=places, curator=whole, exhibits=20-9000, entry_fee=0-45, floors=1-9
"""

VALIDATION_POOLS = """
v_names: Astrid, Boris, Celine, Dmitri, Esme, Farid, Greta, Henrik, Ines, Jorge
v_pairs: Mia Novak, Noah Olsen, Olga Petrov, Pia Quist, Rolf Sand, Tim Ulrich, Vera Weber, Yann Zorn
v_towns: Tampa, Quito, Sofia, Riga, Malaga, Bremen, Nantes, Bilbao, Cardiff
v_cheeses: Brie, Gouda, Feta, Cheddar, Edam, Ricotta, Stilton, Manchego, Havarti
v_dances: tango, waltz, salsa, polka, rumba, samba, foxtrot
v_clouds: web node, db node, mail node, file node, log node, test node, game node
v_hobbies: chess, pottery, sewing, fishing, sailing, knitting, juggling, origami
v_flowers: tulip, dahlia, orchid, peony, lilac, jasmine, crocus, azalea
v_gems: ruby, opal, jade, amber, pearl, garnet, onyx, agate
v_levels: beginner, advanced, expert, novice, master, amateur
"""

VALIDATION_TABLES = """
cheeses: cheese=v_cheeses, dairy_city=v_towns, fat_percent=5-75, ripening_days=10-900
servers: server_kind=v_clouds, operator=v_names, uptime_hours=1-9000, cpu_cores=1-16, memory_gb=2-512
dance_classes: dance=v_dances, instructor=v_pairs, enrolled=4-60, class_fee=10-300
hobby_groups: hobby=v_hobbies, chairperson=v_names, founding_year=1900-2020
bouquets: flower=v_flowers, florist=v_pairs, stems=3-99, bouquet_price=5-180, vase_height=8-60
jewels: gemstone=v_gems, seller=v_names, carats=1-40, asking_price=90-9900
players_online: nickname=v_names, skill_level=v_levels, matches_won=0-900, hours_played=1-4000, home_town=v_towns, \
penalties=0-12
market_stalls: stall_owner=v_pairs, market_town=v_towns, goods=v_cheeses, takings=20-4000, square_metres=2-40, \
helpers=0-8, permit_fee=10-400
"""

NEW_POOLS = """
n_names: Aldo, Bettina, Cyrus, Dalia, Emil, Fatou, Gustav, Hilda, Ivo, Jasna
n_pairs: Kai Lund, Lena Mohr, Max Nagy, Nils Orr, Otto Pohl, Rosa Silva, Tomas Ude, Uwe Vogt
n_towns: Zadar, Zagreb, Aarhus, Ghent, Leipzig, Tallinn, Tromso, Vilnius, Zaragoza
n_games: Checkers, Dominoes, Scrabble, Monopoly, Cluedo, Risk, Catan, Backgammon
n_birds: heron, robin, magpie, puffin, pelican, kestrel, starling, woodpecker
n_cakes: carrot cake, lemon loaf, plum tart, fudge bar, nut roll, jam bun, cream puff
n_cars: Zonda, Miura, Elise, Cayman, Supra, Viper, Stelvio, Giulia
n_parts: rotor, piston, valve, gasket, bearing, gearbox, camshaft, radiator
n_grades: bronze, copperplate, steel, tungsten, carbon, ceramic
n_topics: privacy, hacking, backups, malware, firewalls, phishing, passwords
"""

NEW_TABLES = """
board_games: game=n_games, inventor=n_names, min_players=1-8, box_price=8-150
bird_sightings: bird=n_birds, observer=n_pairs, flock_size=1-400, altitude=5-4000
bakeries: cake=n_cakes, pastry_cook=n_names, slices=6-90, oven_minutes=10-120, bakery_town=n_towns
race_cars: car=n_cars, pilot=n_pairs, horsepower=90-900, laps=3-80, pit_stops=0-9
spare_parts: part=n_parts, grade=n_grades, warehouse_town=n_towns, in_stock=0-900, part_weight=1-90
seminars: topic=n_topics, speaker=n_pairs, attendees=5-600
podcasts: host=n_names, theme=n_topics, episodes=5-900, listeners_daily=20-9000, season=1-12, ad_income=10-5000, \
studio_town=n_towns
harvests: grower=n_pairs, field_grade=n_grades, barrels=2-700, acid_level=1-14
"""


def _read(pools: str, tables: str) -> dict[str, Columns]:
    words = {}
    for line in pools.strip().splitlines():
        name, listed = line.split(": ")
        words[name] = tuple(listed.split(", "))
    found: dict[str, Columns] = {}
    for line in tables.strip().splitlines():
        table, listed = line.split(": ")
        columns = [column.split("=") for column in listed.split(", ")]
        found[table] = {name: words[kind] if kind in words else _range(kind) for name, kind in columns}
    return found


def _range(text: str) -> range:
    """The whole numbers of "3-40", both ends included."""
    low, high = text.split("-")
    return range(int(low), int(high) + 1)


TRAIN = _read(TRAIN_POOLS, TRAIN_TABLES)
VALIDATION = _read(VALIDATION_POOLS, VALIDATION_TABLES)
NEW = _read(NEW_POOLS, NEW_TABLES)
TABLES = TRAIN | VALIDATION | NEW
