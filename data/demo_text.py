"""The demo's first language: requests to a voice assistant in English, drawn from a small grammar.

Names carry the difficulty that the later stages are about: half of the first names belong to a group that sounds alike
(caitlin, kaitlyn), so which spelling is meant can be known from a contact list and from nothing in the audio.
"""

from .grammar import Grammar, Intent, listed

_HOMOPHONES = tuple(tuple(group.split()) for group in listed("""
    caitlin kaitlyn katelyn, marc mark, sara sarah, jon john, steven stephen, eric erik, brian bryan,
    catherine kathryn katherine, sean shawn shaun, geoff jeff, philip phillip, alan allan allen, anne ann,
    carl karl, christina kristina, zoe zoey, zach zack, rachel rachael, rebecca rebekah, neil neal"""))  # fmt: skip

_SLOTS: dict[str, tuple[str, ...]] = {
    "person": listed("{first}, {first}, {first} {last}"),
    "first": listed("{alike}, {distinct}"),
    "alike": tuple(name for group in _HOMOPHONES for name in group),
    "distinct": listed("""
        amanda, anthony, bridget, david, emma, george, henry, jacob, joshua, leonard, maria, melissa,
        nadia, oscar, peter, richard, samuel, susan, vanessa, wendy"""),
    "last": listed("""
        adams, bennett, collins, edwards, foster, harrison, jenkins, kennedy, martinez, murphy, palmer,
        peterson, russell, sullivan, turner, williams"""),
    "relative": listed("""
        mum, dad, my wife, my husband, my sister, my brother, my boss, grandma, the office, the dentist"""),
    "callee": listed("{person}, {person}, {person}, {person}, {relative}"),
    "city": listed("""
        amsterdam, barcelona, birmingham, brussels, cardiff, dallas, dublin, glasgow, houston, lisbon,
        madrid, melbourne, montreal, munich, oslo, philadelphia, rome, stockholm, toronto, vienna"""),
    "street": listed("""
        abbey street, abbey road, bridge street, bridge square, chapel road, chapel lane, dover street,
        dover avenue, harbour street, harbour road, maple street, maple road, oak street, oak square,
        pine road, pine lane, river street, river avenue, victoria street, victoria road"""),
    "place": listed("""
        the airport, the train station, the bus stop, the hospital, the library, the museum, the town hall,
        the university, the post office, the cinema"""),
    "destination": listed("{street}, {street}, {city}, {city}, {place}, {digit_word} {street}"),
    "nearest": listed("petrol station, coffee shop, pharmacy, supermarket, bank, cash machine, bakery, car park"),
    "digit_word": listed("one, two, three, four, five, six, seven, eight, nine"),
    "teen": listed("ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen"),
    "tens": listed("twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety"),
    "number": listed("{digit_word}, {teen}, {tens}, {tens} {digit_word}, {tens} {digit_word}"),
    "hour": listed("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"),
    "minute": listed("five, ten, twenty, twenty five, quarter"),
    "clock_minute": listed("fifteen, thirty, forty five, twenty, ten, fifty, twenty five, thirty five"),
    "part": listed("in the morning, in the afternoon, in the evening, at night, tomorrow, tonight, today"),
    "time": listed("""
        {hour}, half past {hour}, {minute} past {hour}, {minute} to {hour}, {hour} {clock_minute}, noon,
        {hour} {part}, half past {hour} {part}, {hour} {clock_minute} {part}, midnight"""),
    "weekday": listed("monday, tuesday, wednesday, thursday, friday, saturday, sunday"),
    "month": listed("january, february, march, april, may, june, july, august, september, october, november, december"),
    "ordinal": listed("""
        first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth"""),
    "day": listed("""
        today, tomorrow, on {weekday}, on {weekday}, next {weekday}, this weekend, next week,
        on the {ordinal} of {month}"""),
    "span": listed("""
        {digit_word} minutes, {teen} minutes, {tens} minutes, {tens} seconds, {tens} {digit_word} minutes,
        an hour, half an hour, {digit_word} hours, an hour and a half, {digit_word} minutes and {tens} seconds"""),
    "chore": listed("""
        {verb_chore}, {verb_chore}, call {callee}, buy {food}, pick up {person} from {place},
        send {person} the {document}, book a table for {digit_word}"""),
    "verb_chore": listed("""
        water the plants, take out the rubbish, pay the rent, walk the dog, feed the cat, charge my phone,
        renew my passport, clean the windows, do the laundry, take my medicine"""),
    "document": listed("report, photos, invoice, tickets, address, slides"),
    "message": listed("""
        i am running late, i am on my way, i will be there in {span}, i will be there at {time},
        happy birthday, see you {day}, see you at {time}, dinner is ready, please call me back,
        i am stuck in traffic, do not forget the {food}, the meeting is cancelled,
        the meeting has moved to {time}, thank you for the {gift}, can you pick me up from {place},
        can you bring some {food}, the train is delayed by {span}, meet me at {place} at {time},
        i left my {object} at home, have you seen my {object}"""),
    "gift": listed("flowers, present, card, cake, book"),
    "object": listed("keys, wallet, umbrella, glasses, laptop, jacket, scarf, gloves"),
    "food": listed("""
        milk, butter, yoghurt, bananas, grapes, potatoes, carrots, lettuce, garlic, pasta, sugar, pepper,
        honey, peanut butter, orange juice, red wine, salmon, sausages, chocolate, ice cream"""),
    "household": listed("toilet paper, washing powder, dish soap, shampoo, toothpaste, batteries"),
    "quantity": listed("a bag of, a box of, a pound of, a kilo of, some, more, two packets of"),
    "item": listed("{food}, {food}, {quantity} {food}, {household}"),
    "room": listed("kitchen, bedroom, living room, bathroom, hallway, garage, dining room, office"),
    "device": listed("lights, lamp, fan, heater, television, radio, speaker"),
    "appliance": listed("dishwasher, washing machine, oven, robot vacuum, coffee machine"),
    "colour": listed("red, blue, green, yellow, purple, orange"),
    "opening": listed("front door, back door, garage door, garden gate, bathroom window"),
    "degrees": listed("{teen} degrees, twenty degrees, twenty {digit_word} degrees"),
    "weather": listed("rain, snow, sunshine, thunder, fog, strong wind"),
    "garment": listed("a coat, an umbrella, sunglasses, boots"),
    "genre": listed("jazz, blues, classical music, rock, country, hip hop, reggae"),
    "artist": listed("""
        the velvet foxes, silver harbour, midnight parade, the paper kites, golden summer, electric garden"""),
    "song": listed("""
        dancing in the rain, river of dreams, broken compass, walking home, the last train,
        under the bridge"""),
    "mood": listed("relaxing, happy, sad, energetic, romantic"),
    "event": listed("meeting, lunch, dinner, job interview, phone call, coffee, haircut, dentist appointment"),
    "unit_pair": listed("miles in kilometres, pounds in kilograms, inches in centimetres, euros in dollars"),
    "animal": listed("an elephant, a giraffe, a tiger, a penguin"),
    "language": listed("french, german, spanish, italian, portuguese"),
    "phrase": listed("good morning, thank you very much, where is the station, how much does it cost"),
    "please": ("", "", "", "", " please"),
    "dish": listed("pasta, rice, egg, tea, pizza, cake"),
}  # fmt: skip

_INTENTS: dict[str, Intent] = {
    "call": Intent(12, listed("""
        call {callee}{please}, call {person} on speaker, phone {person} at work, ring {callee}{please},
        call {person} on the mobile, start a video call with {person}, video call {person} {day},
        call {person} back in {span}, call {person} and then {relative}, i want to talk to {person},
        put me through to {person}, redial {person}""")),
    "message": Intent(13, listed("""
        tell {callee} {message}, text {callee} {message}, send {person} a message saying {message},
        message {person} {message}, send a text to {person} {message}, write to {person} {message},
        read the last message from {person}, did {person} reply to my message, ask {person} {message},
        forward the {document} to {person}, send the {document} to {person} and {person}""")),
    "calendar": Intent(11, listed("""
        schedule a {event} with {person} {day} at {time}, add a {event} with {person} {day},
        move my {event} with {person} to {time}, when is my {event} with {person}, cancel my {event} {day},
        what is on my calendar {day}, am i free {day} at {time}, book a {event} for {day} at {time},
        invite {person} to the {event} {day}, how long is my {event} {day}, when is my next {event}""")),
    "alarm": Intent(7, listed("""
        wake me up at {time}, set an alarm for {time}{please}, set an alarm for {time} every {weekday},
        cancel the alarm for {time}, move my alarm to {time}, snooze for {digit_word} minutes,
        wake me up in {span}, set a second alarm for {time}, which alarms are set for {weekday}""")),
    "timer": Intent(5, listed("""
        set a timer for {span}{please}, set a {dish} timer for {span}, start a timer for {span},
        add {span} to the timer, how much time is left on the {dish} timer, pause the {dish} timer,
        cancel the timer for the {dish}, count down from {number}""")),
    "reminder": Intent(8, listed("""
        remind me to {chore} {day}, remind me to {chore} at {time}, remind me to {chore} in {span},
        remind {person} to {verb_chore}, do not let me forget to {chore}, add {verb_chore} to my list,
        remind me about {artist} tickets {day}""")),
    "weather": Intent(7, listed("""
        what is the weather in {city}, what is the weather like in {city} {day}, will it rain in {city} {day},
        how cold is it in {city}, is there going to be {weather} {day}, do i need {garment} {day},
        how hot will it get in {city} {day}, when does the sun set in {city},
        should i take {garment} to {city}, is {weather} expected in {city},
        is it colder than {degrees} in {city}""")),
    "navigation": Intent(10, listed("""
        take me to {destination}, navigate to {destination}{please}, how do i get to {destination},
        how far is it to {destination}, drive to {destination} and avoid the motorway,
        find the nearest {nearest}, how long does it take to walk to {destination},
        is there a {nearest} on {street}, show me the traffic on {street},
        when does the next train to {city} leave, book a taxi to {destination} at {time},
        find a hotel in {city}, what time is the flight from {city} to {city}, take me home along {street},
        find a {nearest} near {street}, give me directions from {street} to {destination}""")),
    "music": Intent(7, listed("""
        play {genre}, play {song} by {artist}, play some {mood} {genre}, play {artist} in the {room},
        add {song} to my {mood} playlist, skip to {song}, who sings {song}, play the new album by {artist},
        turn the volume up to {number} percent, shuffle my {mood} playlist, play something {mood},
        stop playing {artist}""")),
    "home": Intent(9, listed("""
        turn on the {room} {device}{please}, turn off the {room} {device},
        switch off the {device} in the {room}, dim the {room} lights to {number} percent,
        make the {room} lights {colour}, set the {room} to {degrees}, start the {appliance}{please},
        start the {appliance} at {time}, is the {opening} closed, open the {opening},
        close the {opening} at {time}, lock the {opening}, turn off everything except the {room} {device},
        turn on the {appliance} in {span}, how warm is it in the {room}""")),
    "shopping": Intent(6, listed("""
        add {item} to my shopping list, add {item} and {item} to the list, put {item} on the shopping list,
        remove {food} from my shopping list, order {quantity} {food}, do we need {item}, we are out of {item},
        how much is {quantity} {food}, find a recipe with {food} and {food}""")),
    "question": Intent(5, listed("""
        what is {number} times {number}, what is {number} plus {number}, how much is {number} {unit_pair},
        how fast can {animal} run, what does {animal} eat, how old can {animal} get,
        how do you say {phrase} in {language}, what is the capital of the country where they speak {language},
        what time is it in {city}, how many people live in {city}""")),
}  # fmt: skip

ENGLISH = Grammar(
    slots=_SLOTS,
    intents=_INTENTS,
    keyword_slots=("person", "city", "street"),
    homophones=_HOMOPHONES,
    lengths=range(2, 15),
)
