"""The kinds of questions that tasks/scope.py declines, and the words that are put into them."""
from typing import NamedTuple


class Kind(NamedTuple):
    """Questions of one kind: why they are declined, and how they are put.

    reason: a key of REFUSALS. templates: braces name a list of FILLERS.
    """
    reason: str
    templates: tuple


def _words(text):
    """The pieces of a text that commas divide."""
    return tuple(piece.strip() for piece in text.split(","))


FILLERS = {
    "country": _words(
        "France, Japan, Brazil, Kenya, Norway, Canada, Peru, Egypt, Spain, Mexico, Poland, Greece, "
        "Vietnam, Turkey, Chile, Ghana, Sweden, Austria, Portugal, Nepal, Cuba, Iceland, Morocco"),
    "city": _words(
        "Paris, Berlin, Tokyo, Madrid, Boston, Cairo, Sydney, Oslo, Lima, Toronto, Rome, Vienna, "
        "Chicago, Mumbai, Dublin, Prague, Athens, Lisbon, Seattle, Hamburg, Geneva, Singapore"),
    "person": _words(
        "Napoleon, Einstein, Cleopatra, Beethoven, Gandhi, Darwin, Picasso, Newton, Columbus, "
        "Shakespeare, Aristotle, Galileo, Churchill, Mandela, Van Gogh, Queen Victoria, Plato, "
        "Isaac Asimov, Charlie Chaplin, Alan Turing, Frida Kahlo, Abraham Lincoln, Goethe"),
    "mountain": _words("the Matterhorn, Mont Blanc, Kilimanjaro, Mount Fuji, the Zugspitze, K2"),
    "water": _words("the Nile, the Amazon, Lake Geneva, the Pacific, the Rhine, the Black Sea"),
    "event": _words(
        "the Cold War, the moon landing, the Industrial Revolution, the Battle of Hastings, "
        "the Black Death, the fall of the Berlin Wall, the Civil War, the Renaissance, "
        "the sinking of the Titanic, the Ice Age, the Vietnam War, the Great Depression"),
    "why": _words(
        "grass green, snow white, blood red, ice slippery, the sun hot, the night dark, "
        "the sea blue, iron heavy, glass clear, honey sweet, the desert dry, winter cold"),
    "concept": _words(
        "gravity, electricity, evolution, magnetism, climate change, a rainbow, an atom, "
        "radiation, friction, a virus, osmosis, energy, oxygen, an earthquake, a volcano, "
        "philosophy, capitalism, a recession, art, love, happiness, justice, time, a leap year"),
    "machine": _words(
        "a fridge, a car engine, a telescope, a battery, the internet, a clock, a toilet, "
        "a piano, a rocket, a solar panel, a camera, a lift, a dishwasher, GPS, a bicycle"),
    "animal": _words(
        "cow, spider, horse, tiger, snail, parrot, shark, rabbit, bee, wolf, frog, camel, goat, "
        "duck, bear, owl, ant, mouse, hamster, giraffe, crocodile, squirrel, butterfly, pig"),
    "plant": _words(
        "rose, tomato, oak tree, tulip, basil, lemon tree, fern, sunflower, potato, palm, "
        "lavender"),
    "planet": _words("Jupiter, Saturn, Venus, the sun, Neptune, Mercury, Pluto, the Milky Way"),
    "book": _words(
        "Moby Dick, The Lord of the Rings, Faust, Don Quixote, Dracula, War and Peace, Dune, "
        "The Little Prince, Pride and Prejudice, Robinson Crusoe, Alice in Wonderland, Macbeth"),
    "film": _words(
        "Titanic, Star Wars, Casablanca, The Matrix, Frozen, Jaws, Psycho, Avatar, Bambi, Rocky"),
    "musician": _words(
        "Elvis, Madonna, Bach, Abba, David Bowie, Adele, Chopin, Bob Dylan, Beyonce, Vivaldi"),
    "sport": _words(
        "tennis, football, chess, golf, rugby, swimming, basketball, cricket, boxing, hockey"),
    "year": _words("1966, 1980, 1994, 2002, 2010, 2015, 2021, 1789, 1914, 1492, 2024, 1850"),
    "thing": _words(
        "gold, petrol, a loaf of bread, a flat, a used car, a haircut, a stamp, a laptop, a litre "
        "of milk, a cinema ticket, a kilo of apples, a sofa, a new roof, a wedding ring"),
    "word": _words(
        "ambiguous, window, frugal, happy, resilient, table, eloquent, letter, quick, gratitude, "
        "begin, obsolete, dog, return, candid, house, empty, nostalgia, simple, freedom, pretty"),
    "food": _words(
        "rice, a steak, lentils, pasta, a cake, fish, soup, salad, bread, potatoes, noodles, "
        "a pizza, mushrooms, chicken, an omelette, beans, curry, pumpkin, asparagus, eggs, cheese"),
    "drink": _words("wine, beer, water, green tea, coffee, milk, orange juice, cola, whisky"),
    "chore": _words(
        "clean an oven, paint a wall, unblock a sink, fold a shirt, sharpen a knife, hang a shelf, "
        "get rid of ants, wash a wool jumper, fix a leaking tap, repair a bike, light a fire, "
        "mow the lawn, defrost a freezer, iron a shirt, polish shoes, grow tomatoes, bake bread"),
    "stain": _words("coffee, grease, blood, ink, chocolate, grass, curry, paint, wax"),
    "ache": _words(
        "a sore throat, a cold, back pain, a fever, toothache, a rash, a cough, stomach ache, "
        "a burn on my hand, an itchy eye, a swollen knee, trouble sleeping"),
    "relative": _words(
        "mother, boss, brother, neighbour, wife, husband, daughter, friend, teacher, uncle, "
        "grandmother, son, sister, colleague, landlord, doctor"),
    "news": _words(
        "I am moving out, I lost my job, I broke the lamp, I am pregnant, I failed the exam, "
        "I forgot the birthday, I do not want to come, I need money, I crashed the car"),
    "decision": _words(
        "buy a house, have children, learn French, change my job, get a dog, go to university, "
        "marry him, move abroad, sell my car, study law, cut my hair, start a company"),
    "product": _words(
        "laptop, bicycle, washing machine, camera, mattress, coffee machine, tent, phone, car, "
        "guitar, vacuum cleaner, winter coat, pair of headphones, printer, television, toaster"),
    "errand": _words(
        "an alarm for seven, a taxi, a pizza, flowers for my mother, a table for four, "
        "an appointment with the doctor, two tickets for the concert, a new lamp, some milk"),
    "command": _words(
        "open the garage, turn on the radio, close the curtains, stop the music, lock the door, "
        "switch on the heating, start the dishwasher, dim the light, record the match, "
        "feed the dog, print this page, delete all my photos, turn up the volume, go to sleep"),
    "topic": _words(
        "school uniforms, the moon, friendship, football, climate protection, the sea, winter, "
        "a lonely robot, electric cars, social media, my hometown, gardening, jazz, dogs, money, "
        "the future, nuclear power, holidays, vegetarian food, honesty, video games, cats, trains"),
    "text": _words(
        "letter, speech, song, poem, essay, story, blog post, thank you note, summary, headline, "
        "diary entry, love letter, job application, slogan, limerick, complaint"),
    "hobby": _words("film, season, animal, food, song, book, number, holiday, city, sport, hobby"),
    "choice": _words(
        "tea or coffee, cats or dogs, the city or the country, summer or winter, football or "
        "tennis, books or films, a train or a plane, Linux or Windows, gas or electric, paint or "
        "wallpaper, butter or margarine, Mercedes or BMW, red or blue, sea or mountains"),
    "feeling": _words(
        "sad, lonely, hungry, tired, bored, in love, angry, afraid, proud, jealous, cold, alive"),
    "deed": _words(
        "boil, water, paint, hug, fry, polish, whisper, bake, tickle, sing, plough, knit, sweep, "
        "chew, iron, yawn, stroke, rinse, peel, dance, juggle, melt, unpickle, teleport, shrink, "
        "translate, jump, guess, predict, cook, clean, fetch, brew, sew, mow, dig, forgive"),
    "object": _words(
        "eggs, spoon, cloud, carpet, garden, apple, banana, chair, moon, breakfast, sofa, shoe, "
        "money, river, all, twice, quickly, everything, world, stone, candle, dinner, weather"),
    "room": _words(
        "kitchen, garden, bathroom, village, weather, coffee, cat, holiday, market, forest, "
        "castle, breakfast, bicycle, museum, piano, beach, bakery, dragon, winter, football"),
    "does": _words(
        "adds two numbers, sorts a list, counts words, checks for a palindrome, prints a triangle, "
        "computes a factorial, finds the largest number, removes duplicates, parses a date, "
        "reads a csv file, shuffles cards, draws a circle, converts text to upper case, "
        "flattens a list, validates an email address, plays tic tac toe, downloads a page"),
    "coding": _words(
        "open a file, sort a list, write a loop, join two strings, parse json, copy a list, "
        "make a class, catch an exception, remove a key from a dict, round a number, "
        "start a thread, format a date, read a line of input, draw a plot, send a request, "
        "split a string, delete a folder, connect to a database, call a function, import a module"),
    "trouble": _words(
        "crash, print nothing, run forever, raise a TypeError, use so much memory, give the wrong "
        "result, not compile, say index out of range, stop in the loop, ignore my input"),
    "code": _words(
        "x = = 3, print 'hi, if x > 3 print(x), def f(: pass, while True, for x in 10: print(x), "
        "import nunpy, return x +, [1 2 3], else: y = 2"),
    "tool": _words(
        "git, Docker, Linux, Excel, pandas, Postgres, React, Bash, vim, Kubernetes, Photoshop, "
        "Firefox, Word, Android, an IDE, a compiler, an API, a virtual environment"),
    "code_language": _words("Java, Rust, C++, JavaScript, Haskell, SQL, Go, PHP, Ruby, assembly"),
    "language": _words(
        "French, German, Spanish, Italian, Russian, Chinese, Latin, Dutch, Arabic, Polish, Greek, "
        "Turkish, Swedish, Korean, Hindi, Portuguese, Welsh, Finnish"),
    "phrase": _words(
        "thank you, good night, where is the station, bread, please, cheese, I am hungry, sorry, "
        "happy birthday, horse, see you tomorrow, the bill please, water, how are you, summer, "
        "yes"),
    "german": _words(
        "das Wetter, die Liebe, der Hund, ein Auto, die Schule, mein Bruder, der Mond, das Brot, "
        "die Arbeit, ein Baum, die Uhr, der Computer, das Fenster, meine Katze, der Fluss"),
    "french": _words(
        "le chat, la maison, mon frère, la lune, le pain, un arbre, la mer, le train, ma voiture, "
        "l'école, le temps, la musique, un ordinateur, le roi, la porte, mon ami"),
    "spanish": _words(
        "el perro, la casa, mi hermano, el mar, la luna, un libro, el tren, la comida, el tiempo, "
        "mi amigo, una ventana, el rey, la música, el dinero, la escuela"),
    "italian": _words(
        "il gatto, la casa, mio fratello, il mare, la luna, un libro, il treno, il pane, "
        "la scuola, il tempo, una finestra, la musica, il re, mia madre, la strada"),
    "polish": _words(
        "kot, dom, chleb, mój brat, morze, pociąg, szkoła, pogoda, muzyka, okno, książka, praca"),
    "russian": _words(
        "кошка, дом, хлеб, мой брат, море, поезд, школа, погода, музыка, окно, книга, работа"),
    "chinese": _words("天气, 猫, 房子, 面包, 火车, 学校, 音乐, 书, 工作, 月亮, 朋友, 时间, 茶"),
    "mash": _words(
        "asdfgh, jkjkjk, qwertz, lkjhgf, xxxx, aaaaa, dfgdfg, hjkl hjkl, zxcvbn, wefwef, ööö, "
        "ghghgh, poiu, sdfsdf sdf, mnbv, qqq www eee, fjfjfj, tztztz, uiuiui, vbvbvb"),
    "blorp": _words(
        "blorp, florgle, zwim, grickle, snarp, mimble, trazzle, vonk, plind, quibber, dralf, "
        "wozzle, spleem, brint, yarg, fnord, glimp, hurple, jabberdock, krell, norf, skrunt"),
    "bit": _words(
        "the, of, and, but then, green, seven or, under the, maybe, not, if, very, the other one, "
        "banana, because, it, almost, between, no no, was, which, for the, so, more, again and"),
    "mark": _words("?, ??, !!!, ..., ., -, :, ;), ?!, #, *"),
    "number": _words("16, 49, 91, 7, 120, 360, 25, 1000, 17, 64, 250, 13, 81, 400, 2.5, 37"),
    "percent": _words("5, 10, 20, 25, 33, 50, 75, 90"),
    "unit": _words(
        "miles, kilos, pounds, gallons, feet, litres, metres, ounces, acres, degrees, hours, "
        "yards"),
    "formula": _words(
        "3x + 4 = 19, x - 7 = 12, 2x = 10, x^2 = 9, 5y + 1 = 26, a + b = 10, x / 4 = 3"),
    "function": _words("x^2, sin x, 3x + 1, e^x, log x, x^3 - x, cos 2x, 1/x"),
    "container": _words(
        "a year, a deck of cards, a football team, a dozen, an orchestra, a week, the alphabet, "
        "the European Union, a chess set, an hour, a bag of rice, the world, a human body"),
    "items": _words(
        "days, people, cards, strings, countries, stars, seats, rooms, grains, hours, teeth, keys, "
        "wheels, players, pages, windows, muscles, languages, islands, coins, doors, floors, "
        "colours, chapters, weeks, bridges, lakes, engines, nerves, birds, sides, buttons"),
    "noun": _words(
        "table, bottle, street, ladder, pillow, ticket, battery, hammer, blanket, bucket, jacket, "
        "mirror, engine, balloon, candle, carpet, ceiling, chimney, cupboard, curtain, envelope, "
        "fence, flag, fridge, garage, glove, hat, helmet, island, jungle, kettle, lamp, lawyer, "
        "farmer, nurse, pilot, baker, soldier, king, dentist, judge, painter, poet, waiter, "
        "market, medal, meeting, museum, napkin, necklace, newspaper, office, orchestra, parcel, "
        "passport, pencil, picture, pocket, prison, pump, puzzle, raincoat, recipe, restaurant, "
        "river, road, roof, rope, salary, sandwich, scarf, school, screw, shadow, shelf, ship, "
        "shirt, shower, sister, spoon, stadium, station, stomach, storm, story, sweater, team, "
        "temple, thunderstorm, tower, toy, tractor, tunnel, umbrella, uniform, valley, village, "
        "violin, wallet, wedding, wheel, whistle, window, winner, zoo, baby, brain, bridge, "
        "church, city, heart, lake, moon, party, exam, job, holiday, secret, dream, question, "
        "lesson, price, pain, war, planet"),
    "adjective": _words(
        "old, heavy, cheap, expensive, dirty, blue, small, quick, dangerous, quiet, bright, sour, "
        "famous, broken, strong, thin, warm, wet, round, useful, boring, deep, loud, healthy, bad, "
        "good, nice, long, late, busy, empty, wild, young, rich, hard, true, open, ready"),
    "verb": _words(
        "work, sleep, fly, help, grow, sing, begin, wait, travel, fight, laugh, learn, rest, win, "
        "dance, cry, change, stop, cost, hurt, arrive, float, burn, break, smell, vote, dream"),
    "when": _words(
        "today, tonight, tomorrow, last year, next week, in summer, on Monday, at night, at nine, "
        "this year, every day, at Christmas, yesterday, now, in 1950, soon"),
    "mine": _words(
        "birthday, phone number, wife, favourite food, address, job, password, car, middle name, "
        "school, neighbour, shoe size, flight, last message"),
}


# ----------------------------------------------------------------------------------------------
# questions that stand alone

KINDS = {
    # the world
    "capitals": Kind("unknown", (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "capital of {country}",
        "Is {city} the capital of {country}?",
    )),
    "countries": Kind("unknown", (
        "Where is {country}?",
        "How many people live in {country}?",
        "What language do people speak in {country}?",
        "Which countries border {country}?",
        "Tell me about {country}.",
        "What is the currency of {country}?",
    )),
    "cities": Kind("unknown", (
        "How far is it from {city} to {city2}?",
        "How big is {city}?",
        "Where is {city}?",
        "What can I see in {city}?",
        "Is {city} bigger than {city2}?",
        "Who is the mayor of {city}?",
    )),
    "mountains and rivers": Kind("unknown", (
        "How high is {mountain}?",
        "Where is {mountain}?",
        "How deep is {water}?",
        "How long is {water}?",
        "Who first climbed {mountain}?",
    )),
    "people": Kind("unknown", (
        "Who was {person}?",
        "When was {person} born?",
        "What did {person} do?",
        "Where did {person} live?",
        "What is {person} famous for?",
        "Tell me about {person}.",
        "Did {person} know {person2}?",
    )),
    "history": Kind("unknown", (
        "When was {event}?",
        "Why did {event} happen?",
        "What was {event}?",
        "Who was to blame for {event}?",
        "What happened in {year}?",
        "How did {event} change the world?",
    )),
    "science": Kind("unknown", (
        "What is {concept}?",
        "Explain {concept}.",
        "Explain {concept} to a child.",
        "Why is {why}?",
        "Who discovered {concept}?",
        "What do you know about {concept}?",
    )),
    "machines": Kind("unknown", (
        "How does {machine} work?",
        "Who invented {machine}?",
        "What is inside {machine}?",
        "When was {machine} invented?",
    )),
    "animals": Kind("unknown", (
        "How many legs does a {animal} have?",
        "What does a {animal} eat?",
        "What does a {animal} do in winter?",
        "How long does a {animal} live?",
        "Can a {animal} swim?",
        "Why does a {animal} sleep so much?",
        "What is a {animal}?",
    )),
    "plants": Kind("unknown", (
        "How often do I water a {plant}?",
        "When do I plant a {plant}?",
        "Why does my {plant} have yellow leaves?",
        "How tall does a {plant} get?",
        "Where does a {plant} grow best?",
    )),
    "space": Kind("unknown", (
        "How far away is {planet}?",
        "How hot is {planet}?",
        "How old is {planet}?",
        "What is {planet} made of?",
        "Can people live on {planet}?",
    )),
    "books": Kind("unknown", (
        "Who wrote {book}?",
        "What is {book} about?",
        "How does {book} end?",
        "When was {book} written?",
        "Is {book} worth reading?",
    )),
    "films": Kind("unknown", (
        "Who plays in {film}?",
        "When did {film} come out?",
        "Which film is like {film}?",
        "Who made {film}?",
        "How long is {film}?",
    )),
    "music": Kind("unknown", (
        "Which songs are by {musician}?",
        "Who is {musician}?",
        "Is {musician} still alive?",
        "What is the best album of {musician}?",
        "Which instrument did {musician} play?",
    )),
    "sport": Kind("unknown", (
        "Who won the {sport} final in {year}?",
        "How many players are in a {sport} team?",
        "What are the rules of {sport}?",
        "Who is the best at {sport}?",
        "When is the next {sport} match?",
    )),
    "today": Kind("unknown", (
        "What is the weather in {city}?",
        "What time is it?",
        "What time is it in {city}?",
        "What is the date?",
        "What day is it?",
        "Will it snow in {city}?",
        "What is in the news?",
        "Who is the president of {country}?",
    )),
    "prices": Kind("unknown", (
        "How much is {thing}?",
        "What does {thing} cost?",
        "What is the price of {thing}?",
        "Why is {thing} so expensive?",
        "How much was {thing} in {year}?",
    )),
    "meanings of words": Kind("unknown", (
        "What does the word {word} mean?",
        "What does {word} mean?",
        "Define {word}.",
        "What is the opposite of {word}?",
        "Which word rhymes with {word}?",
        "What is another word for {word}?",
        "How do you pronounce {word}?",
        "Where does the word {word} come from?",
        "What is the plural of {word}?",
    )),
    "higher mathematics": Kind("unknown", (
        "What is the square root of {number}?",
        "Is {number} a prime number?",
        "Solve {formula}.",
        "What is {percent} percent of {number}?",
        "What is the derivative of {function}?",
        "Integrate {function}.",
        "What are the divisors of {number}?",
        "What is the logarithm of {number}?",
    )),
    "units": Kind("unknown", (
        "How many {unit} are {number} {unit2}?",
        "Convert {number} {unit} to {unit2}.",
        "How much is a pound in {unit}?",
        "What are {number} {unit} in {unit2}?",
    )),
    "how many there are": Kind("unknown", (
        "How many {items} are in {container}?",
        "How many {items} are there in {container}?",
        "How many {items} does {container} have?",
        "Count the {items} in {container}.",
    )),
    "quantities": Kind("unknown", (
        "How many {animal}s are there in {country}?",
        "How many books did {person} write?",
        "How many days are left until {event}?",
        "How many guests can I invite?",
        "How many {product}s are sold in {year}?",
        "How many times did {person} marry?",
        "How many letters does the postman bring?",
        "How many hours do I need for {city}?",
    )),
    "superlatives": Kind("unknown", (
        "Which {animal} is the fastest?",
        "What is the biggest city in {country}?",
        "What is the oldest {plant} in the world?",
        "Who is the richest person in {city}?",
        "Which {sport} club is the best?",
        "What is the smallest {animal}?",
    )),
    "opening hours": Kind("unknown", (
        "What time does the {room} close?",
        "Is the {room} open on Sunday?",
        "When does the {room} open?",
        "How late is the {room} open?",
        "Where is the nearest {room}?",
    )),
    # questions of any words, behind many beginnings
    "any words": Kind("unknown", (
        "How many {noun}s are in a {noun2}?",
        "How many {noun}s are there in the {noun2}?",
        "How many {items} are in a {noun}?",
        "How many {items} until the {noun}?",
        "How much {noun} is in a {noun2}?",
        "How {adjective} is a {noun}?",
        "How does a {noun} {verb}?",
        "How long does the {noun} {verb}?",
        "Which {noun} is the most {adjective}?",
        "Which {noun} will {verb} {when}?",
        "What should the {noun} do {when}?",
        "What is the {noun} of the {noun2}?",
        "What makes a {noun} {adjective}?",
        "What do {noun}s {verb} for?",
        "What shall we do {when}?",
        "Who is the {adjective} {noun}?",
        "Who gave the {noun} to the {noun2}?",
        "When does the {noun} {verb}?",
        "Where does the {noun} {verb}?",
        "Where can I see a {adjective} {noun}?",
        "Why does the {noun} {verb} {when}?",
        "Why are {noun}s {adjective}?",
        "I have a {adjective} {noun}.",
        "The {noun} is {adjective} {when}.",
        "Explain how a {noun} can {verb}.",
        "Guess the {noun}.",
        "{adjective} {noun} {when}",
    )),
    "yes or no": Kind("unknown", (
        "Is the {noun} {adjective}?",
        "Is a {noun} {adjective} for a {noun2}?",
        "Is it {adjective} {when}?",
        "Is it true that {noun}s {verb}?",
        "Are {noun}s {adjective}?",
        "Are there {noun}s in a {noun2}?",
        "Are we {adjective} {when}?",
        "Does a {noun} {verb}?",
        "Do {noun}s {verb} {when}?",
        "Did the {noun} {verb} {when}?",
        "Has the {noun} been {adjective}?",
        "Was the {noun} {adjective} {when}?",
        "Will the {noun} {verb} {when}?",
        "Can a {noun} {verb}?",
        "Could my {noun} be {adjective}?",
        "May I {verb} {when}?",
        "Must the {noun} {verb}?",
        "Should the {noun} {verb} {when}?",
    )),
    "prepositions": Kind("unknown", (
        "At what age do {noun}s {verb}?",
        "At which {noun} do we {verb}?",
        "In which year was the first {noun}?",
        "In which {noun} do people {verb}?",
        "On which day does the {noun} {verb}?",
        "For how long can a {noun} {verb}?",
        "From where is the {noun}?",
        "With whom does the {noun} {verb}?",
        "To which {noun} does the {noun2} belong?",
        "By what is a {noun} made {adjective}?",
        "Under which {noun} is the {noun2}?",
    )),
    # everyday life
    "cooking": Kind("unknown", (
        "How do I cook {food}?",
        "How long do I cook {food}?",
        "Give me a recipe for {food}.",
        "What goes well with {food}?",
        "How do you make {food}?",
        "Can I freeze {food}?",
    )),
    "household": Kind("unknown", (
        "How do I {chore}?",
        "What is the best way to {chore}?",
        "How can I remove a {stain} stain?",
        "What do I need to {chore}?",
        "Can you show me how to {chore}?",
    )),
    "health": Kind("unknown", (
        "I have {ache}. What should I do?",
        "What helps against {ache}?",
        "Is {food} healthy?",
        "How much {drink} may I drink?",
        "Do I need a doctor for {ache}?",
        "Is {drink} good for me?",
    )),
    "travel": Kind("unknown", (
        "How do I get to {city}?",
        "How much is a flight to {country}?",
        "When is the best time to visit {country}?",
        "Which hotel in {city} is good?",
        "Is {country} safe?",
        "When does the train to {city} leave?",
    )),
    "shopping": Kind("unknown", (
        "Which {product} should I buy?",
        "Where can I buy a {product}?",
        "How much does a {product} cost?",
        "What is the best {product}?",
        "Is a used {product} a good idea?",
    )),
    "advice": Kind("unknown", (
        "How do I tell my {relative} that {news}?",
        "My {relative} is angry with me. What now?",
        "Should I {decision}?",
        "What can I give my {relative}?",
        "I had a fight with my {relative}.",
        "I want to {decision}.",
    )),
    "broken things": Kind("unknown", (
        "My {product} is broken.",
        "Why does my {product} make a noise?",
        "My {animal} does not eat. Why?",
        "I cannot find my {product}.",
        "How long does a {product} last?",
        "The {product} does not start. What is wrong?",
    )),
    "the model's life": Kind("unknown", (
        "How old are you?",
        "When is your birthday?",
        "Do you have a {relative}?",
        "Do you have a {animal}?",
        "What did you do yesterday?",
        "Have you ever been to {city}?",
        "Do you sleep?",
        "Can you see me?",
        "Are you a {animal}?",
    )),
    "the user": Kind("unknown", (
        "What is my {mine}?",
        "Do you know my {mine}?",
        "Where is my {mine}?",
        "When is my {relative} coming?",
        "I lost my {mine}.",
        "Who am I?",
    )),
    # things to do
    "commands": Kind("action", (
        "{command}",
        "Can you {command}?",
        "Please {command}.",
        "{command} at {number}",
    )),
    "errands": Kind("action", (
        "Order {errand}.",
        "Get me {errand}.",
        "Can you book {errand}?",
        "Send a message to my {relative}.",
        "Call my {relative}.",
        "Remind me to {decision}.",
    )),
    "texts to write": Kind("action", (
        "Write a {text} about {topic}.",
        "Write me a {text}.",
        "I need a {text} for my {relative}.",
        "Make this {text} shorter.",
        "Can you write a {text} on {topic}?",
        "Help me with a {text}.",
    )),
    "entertainment": Kind("action", (
        "Tell me a story about a {animal}.",
        "Tell me something funny.",
        "Do you know a joke about a {animal}?",
        "Sing a song about {topic}.",
        "Play a game with me.",
        "Cheer me up.",
        "Surprise me.",
    )),
    "ideas": Kind("action", (
        "Give me three ideas for {topic}.",
        "Plan a trip to {city}.",
        "Make a list of {items}.",
        "Suggest a name for my {animal}.",
        "Recommend a {hobby}.",
    )),
    # opinions
    "opinions": Kind("opinion", (
        "What do you think about {topic}?",
        "What do you think of {person}?",
        "Is {topic} good or bad?",
        "Do you like {topic}?",
        "Do you agree with {person}?",
        "Are you for or against {topic}?",
    )),
    "favourites": Kind("opinion", (
        "What is your favourite {hobby}?",
        "Which {hobby} do you like best?",
        "Do you like {food}?",
        "Do you prefer {choice}?",
    )),
    "comparisons": Kind("opinion", (
        "Which is better, {choice}?",
        "{choice}?",
        "What would you choose, {choice}?",
        "Who was greater, {person} or {person2}?",
    )),
    "feelings": Kind("opinion", (
        "Are you {feeling}?",
        "Why are you {feeling}?",
        "I am {feeling}.",
        "Do you ever feel {feeling}?",
        "Have you ever been {feeling}?",
    )),
    # programs
    "programs to write": Kind("code", (
        "Write a function that {does}.",
        "Write a Python program that {does}.",
        "Write code that {does}.",
        "I need a script that {does}.",
        "Show me a class that {does}.",
    )),
    "how to in Python": Kind("code", (
        "How do I {coding} in Python?",
        "How can I {coding}?",
        "What is the Python code to {coding}?",
        "Show me how to {coding}.",
        "How do you {coding} in {code_language}?",
        "What is the best way to {coding}?",
    )),
    "broken programs": Kind("code", (
        "Why does my program {trouble}?",
        "Fix this: {code}",
        "What is wrong with {code}",
        "My code does {trouble}.",
        "{code}",
        "Debug this: {code}",
    )),
    "computers": Kind("unknown", (
        "What is {tool}?",
        "How do I install {tool}?",
        "How do I use {tool}?",
        "Is {tool} free?",
        "Why is {tool} so slow?",
        "What is {code_language} good for?",
    )),
    # languages
    "translation": Kind("language", (
        "Translate {phrase} into {language}.",
        "What is {phrase} in {language}?",
        "How do you say {phrase} in {language}?",
        "What is the {language} word for {word}?",
        "Do you speak {language}?",
        "Say {phrase} in {language}.",
    )),
    "German": Kind("language", (
        "Was ist {german}?",
        "Wo ist {german}?",
        "Wie geht es dir?",
        "Warum ist {german} so wichtig?",
        "Erzähl mir etwas über {german}.",
        "Kannst du mir helfen?",
        "Was kostet {german}?",
    )),
    "French": Kind("language", (
        "Où est {french}?",
        "Qu'est-ce que {french}?",
        "Comment ça va ?",
        "Pourquoi {french} est si important ?",
        "Parle-moi de {french}.",
        "Bonjour, tu peux m'aider ?",
    )),
    "Spanish": Kind("language", (
        "¿Dónde está {spanish}?",
        "¿Qué es {spanish}?",
        "¿Hablas español?",
        "¿Por qué es importante {spanish}?",
        "Háblame de {spanish}.",
        "Hola, ¿qué tal?",
    )),
    "Italian": Kind("language", (
        "Dove è {italian}?",
        "Che cosa è {italian}?",
        "Come stai?",
        "Parlami di {italian}.",
        "Quanto costa {italian}?",
    )),
    "Polish": Kind("language", (
        "Gdzie jest {polish}?",
        "Co to jest {polish}?",
        "Jak się masz?",
        "Dlaczego {polish} jest ważne?",
    )),
    "Russian": Kind("language", (
        "Где {russian}?",
        "Что такое {russian}?",
        "Как дела?",
        "Расскажи мне про {russian}.",
    )),
    "Chinese": Kind("language", (
        "{chinese}是什么?",
        "{chinese}在哪里?",
        "你好",
        "你喜欢{chinese}吗?",
    )),
    # nothing that makes sense
    "keyboards": Kind("nonsense", (
        "{mash}",
        "{mash} {mash2}",
        "{mash}?",
        "{mash2} {mash} {mark}",
    )),
    "made-up words": Kind("nonsense", (
        "What is a {blorp}?",
        "How do I {blorp} a {blorp2}?",
        "{blorp} {blorp2}",
        "The {blorp} is very {blorp2}.",
        "Can you {blorp} me?",
        "{blorp}",
        "Why do {blorp}s {blorp2}?",
    )),
    "fragments": Kind("nonsense", (
        "{bit} {bit2}",
        "{bit} {bit2} {word}",
        "{word} {bit} {animal}",
        "{bit2} the {animal} {bit}",
        "{animal}",
        "{bit}",
    )),
    "marks": Kind("nonsense", (
        "{mark}",
        "{mark} {mark2}",
    )),
}

# ----------------------------------------------------------------------------------------------
# questions that refer to what was said before

FOLLOWING = {
    "and translated": Kind("language", (
        "and in {language}?",
        "Now in {language}.",
        "What is that in {language}?",
        "Translate that into {language}.",
        "How do they say it in {language}?",
        "The same in {language}, please.",
    )),
    "and who": Kind("unknown", (
        "Who invented that?",
        "Who says so?",
        "Where does it come from?",
        "Who uses that?",
        "Since when?",
    )),
    "and why": Kind("unknown", (
        "Why?",
        "Why is that?",
        "How do you know?",
        "Why not {number}?",
        "What is the reason?",
    )),
    "and more": Kind("unknown", (
        "Tell me more.",
        "Give me an example.",
        "More about that, please.",
        "What else do you know about it?",
        "Explain it to a child.",
    )),
    "and as a program": Kind("code", (
        "Write that in {code_language}.",
        "How do I do that in {code_language}?",
        "Show me the code.",
        "Now as a function.",
        "Write a program that does it.",
    )),
    "and as a picture": Kind("action", (
        "Draw it.",
        "Read it aloud.",
        "Show me a picture of it.",
        "Send it to my {relative}.",
        "Save that in a file.",
        "Make a {text} of it.",
    )),
    "and your opinion": Kind("opinion", (
        "Do you like it?",
        "What do you think of it?",
        "Is that good?",
        "Are you proud of that?",
    )),
}
