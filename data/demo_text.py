"""The demo's language: requests to a voice assistant, drawn from a small grammar.

A sentence starts at an intent (call, message, alarm, weather, ...) and its {slots} are filled until none is left. Names
carry the difficulty that the later stages are about: half of the first names belong to a group that sounds alike
(caitlin, kaitlyn), so which spelling is meant can be known from a contact list and from nothing in the audio.

Two sentences are the same if they sound the same, so `call mark` never trains a model that is tested on `call marc`.
What held-out sentences do share with training is the grammar: the same templates with unseen fillings. They measure
whether the words are heard, not whether new phrasings are understood.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    """Split a list whose items are divided by commas."""
    return tuple(" ".join(item.split()) for item in text.split(","))


HOMOPHONES: tuple[tuple[str, ...], ...] = tuple(tuple(group.split()) for group in _words("""
    caitlin kaitlyn katelyn, marc mark, sara sarah, jon john, steven stephen, eric erik, brian bryan,
    catherine kathryn katherine, sean shawn shaun, geoff jeff, philip phillip, alan allan allen, anne ann,
    carl karl, christina kristina, zoe zoey, zach zack, rachel rachael, rebecca rebekah, neil neal"""))  # fmt: skip
SOUNDS_LIKE = {name: group[0] for group in HOMOPHONES for name in group}

# A slot's alternatives are equally likely; naming one twice doubles its share.
SLOTS: dict[str, tuple[str, ...]] = {
    "person": _words("{first}, {first}, {first} {last}"),
    "first": _words("{alike}, {distinct}"),
    "alike": tuple(SOUNDS_LIKE),
    "distinct": _words("""
        amanda, anthony, bridget, david, emma, george, henry, jacob, joshua, leonard, maria, melissa,
        nadia, oscar, peter, richard, samuel, susan, vanessa, wendy"""),
    "last": _words("""
        adams, bennett, collins, edwards, foster, harrison, jenkins, kennedy, martinez, murphy, palmer,
        peterson, russell, sullivan, turner, williams"""),
    "relative": _words("""
        mum, dad, my wife, my husband, my sister, my brother, my boss, grandma, the office, the dentist"""),
    "callee": _words("{person}, {person}, {person}, {person}, {relative}"),
    "city": _words("""
        amsterdam, barcelona, birmingham, brussels, cardiff, dallas, dublin, glasgow, houston, lisbon,
        madrid, melbourne, montreal, munich, oslo, philadelphia, rome, stockholm, toronto, vienna"""),
    "street": _words("""
        abbey street, abbey road, bridge street, bridge square, chapel road, chapel lane, dover street,
        dover avenue, harbour street, harbour road, maple street, maple road, oak street, oak square,
        pine road, pine lane, river street, river avenue, victoria street, victoria road"""),
    "place": _words("""
        the airport, the train station, the bus stop, the hospital, the library, the museum, the town hall,
        the university, the post office, the cinema"""),
    "destination": _words("{street}, {street}, {city}, {city}, {place}, {digit_word} {street}"),
    "nearest": _words("petrol station, coffee shop, pharmacy, supermarket, bank, cash machine, bakery, car park"),
    "digit_word": _words("one, two, three, four, five, six, seven, eight, nine"),
    "teen": _words("ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen"),
    "tens": _words("twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety"),
    "number": _words("{digit_word}, {teen}, {tens}, {tens} {digit_word}, {tens} {digit_word}"),
    "hour": _words("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"),
    "minute": _words("five, ten, twenty, twenty five, quarter"),
    "clock_minute": _words("fifteen, thirty, forty five, twenty, ten, fifty, twenty five, thirty five"),
    "part": _words("in the morning, in the afternoon, in the evening, at night, tomorrow, tonight, today"),
    "time": _words("""
        {hour}, half past {hour}, {minute} past {hour}, {minute} to {hour}, {hour} {clock_minute}, noon,
        {hour} {part}, half past {hour} {part}, {hour} {clock_minute} {part}, midnight"""),
    "weekday": _words("monday, tuesday, wednesday, thursday, friday, saturday, sunday"),
    "month": _words("january, february, march, april, may, june, july, august, september, october, november, december"),
    "ordinal": _words("""
        first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth"""),
    "day": _words("""
        today, tomorrow, on {weekday}, on {weekday}, next {weekday}, this weekend, next week,
        on the {ordinal} of {month}"""),
    "span": _words("""
        {digit_word} minutes, {teen} minutes, {tens} minutes, {tens} seconds, {tens} {digit_word} minutes,
        an hour, half an hour, {digit_word} hours, an hour and a half, {digit_word} minutes and {tens} seconds"""),
    "chore": _words("""
        {verb_chore}, {verb_chore}, call {callee}, buy {food}, pick up {person} from {place},
        send {person} the {document}, book a table for {digit_word}"""),
    "verb_chore": _words("""
        water the plants, take out the rubbish, pay the rent, walk the dog, feed the cat, charge my phone,
        renew my passport, clean the windows, do the laundry, take my medicine"""),
    "document": _words("report, photos, invoice, tickets, address, slides"),
    "message": _words("""
        i am running late, i am on my way, i will be there in {span}, i will be there at {time},
        happy birthday, see you {day}, see you at {time}, dinner is ready, please call me back,
        i am stuck in traffic, do not forget the {food}, the meeting is cancelled,
        the meeting has moved to {time}, thank you for the {gift}, can you pick me up from {place},
        can you bring some {food}, the train is delayed by {span}, meet me at {place} at {time},
        i left my {object} at home, have you seen my {object}"""),
    "gift": _words("flowers, present, card, cake, book"),
    "object": _words("keys, wallet, umbrella, glasses, laptop, jacket, scarf, gloves"),
    "food": _words("""
        milk, butter, yoghurt, bananas, grapes, potatoes, carrots, lettuce, garlic, pasta, sugar, pepper,
        honey, peanut butter, orange juice, red wine, salmon, sausages, chocolate, ice cream"""),
    "household": _words("toilet paper, washing powder, dish soap, shampoo, toothpaste, batteries"),
    "quantity": _words("a bag of, a box of, a pound of, a kilo of, some, more, two packets of"),
    "item": _words("{food}, {food}, {quantity} {food}, {household}"),
    "room": _words("kitchen, bedroom, living room, bathroom, hallway, garage, dining room, office"),
    "device": _words("lights, lamp, fan, heater, television, radio, speaker"),
    "appliance": _words("dishwasher, washing machine, oven, robot vacuum, coffee machine"),
    "colour": _words("red, blue, green, yellow, purple, orange"),
    "opening": _words("front door, back door, garage door, garden gate, bathroom window"),
    "degrees": _words("{teen} degrees, twenty degrees, twenty {digit_word} degrees"),
    "weather": _words("rain, snow, sunshine, thunder, fog, strong wind"),
    "garment": _words("a coat, an umbrella, sunglasses, boots"),
    "genre": _words("jazz, blues, classical music, rock, country, hip hop, reggae"),
    "artist": _words("""
        the velvet foxes, silver harbour, midnight parade, the paper kites, golden summer, electric garden"""),
    "song": _words("""
        dancing in the rain, river of dreams, broken compass, walking home, the last train,
        under the bridge"""),
    "mood": _words("relaxing, happy, sad, energetic, romantic"),
    "event": _words("meeting, lunch, dinner, job interview, phone call, coffee, haircut, dentist appointment"),
    "unit_pair": _words("miles in kilometres, pounds in kilograms, inches in centimetres, euros in dollars"),
    "animal": _words("an elephant, a giraffe, a tiger, a penguin"),
    "language": _words("french, german, spanish, italian, portuguese"),
    "phrase": _words("good morning, thank you very much, where is the station, how much does it cost"),
    "please": ("", "", "", "", " please"),
    "dish": _words("pasta, rice, egg, tea, pizza, cake"),
}  # fmt: skip


class Intent(NamedTuple):
    """Requests of one kind: their share of all sentences, in percent, and the templates, equally likely."""

    share: int
    templates: tuple[str, ...]


INTENTS: dict[str, Intent] = {
    "call": Intent(12, _words("""
        call {callee}{please}, call {person} on speaker, phone {person} at work, ring {callee}{please},
        call {person} on the mobile, start a video call with {person}, video call {person} {day},
        call {person} back in {span}, call {person} and then {relative}, i want to talk to {person},
        put me through to {person}, redial {person}""")),
    "message": Intent(13, _words("""
        tell {callee} {message}, text {callee} {message}, send {person} a message saying {message},
        message {person} {message}, send a text to {person} {message}, write to {person} {message},
        read the last message from {person}, did {person} reply to my message, ask {person} {message},
        forward the {document} to {person}, send the {document} to {person} and {person}""")),
    "calendar": Intent(11, _words("""
        schedule a {event} with {person} {day} at {time}, add a {event} with {person} {day},
        move my {event} with {person} to {time}, when is my {event} with {person}, cancel my {event} {day},
        what is on my calendar {day}, am i free {day} at {time}, book a {event} for {day} at {time},
        invite {person} to the {event} {day}, how long is my {event} {day}, when is my next {event}""")),
    "alarm": Intent(7, _words("""
        wake me up at {time}, set an alarm for {time}{please}, set an alarm for {time} every {weekday},
        cancel the alarm for {time}, move my alarm to {time}, snooze for {digit_word} minutes,
        wake me up in {span}, set a second alarm for {time}, which alarms are set for {weekday}""")),
    "timer": Intent(5, _words("""
        set a timer for {span}{please}, set a {dish} timer for {span}, start a timer for {span},
        add {span} to the timer, how much time is left on the {dish} timer, pause the {dish} timer,
        cancel the timer for the {dish}, count down from {number}""")),
    "reminder": Intent(8, _words("""
        remind me to {chore} {day}, remind me to {chore} at {time}, remind me to {chore} in {span},
        remind {person} to {verb_chore}, do not let me forget to {chore}, add {verb_chore} to my list,
        remind me about {artist} tickets {day}""")),
    "weather": Intent(7, _words("""
        what is the weather in {city}, what is the weather like in {city} {day}, will it rain in {city} {day},
        how cold is it in {city}, is there going to be {weather} {day}, do i need {garment} {day},
        how hot will it get in {city} {day}, when does the sun set in {city},
        should i take {garment} to {city}, is {weather} expected in {city},
        is it colder than {degrees} in {city}""")),
    "navigation": Intent(10, _words("""
        take me to {destination}, navigate to {destination}{please}, how do i get to {destination},
        how far is it to {destination}, drive to {destination} and avoid the motorway,
        find the nearest {nearest}, how long does it take to walk to {destination},
        is there a {nearest} on {street}, show me the traffic on {street},
        when does the next train to {city} leave, book a taxi to {destination} at {time},
        find a hotel in {city}, what time is the flight from {city} to {city}, take me home along {street},
        find a {nearest} near {street}, give me directions from {street} to {destination}""")),
    "music": Intent(7, _words("""
        play {genre}, play {song} by {artist}, play some {mood} {genre}, play {artist} in the {room},
        add {song} to my {mood} playlist, skip to {song}, who sings {song}, play the new album by {artist},
        turn the volume up to {number} percent, shuffle my {mood} playlist, play something {mood},
        stop playing {artist}""")),
    "home": Intent(9, _words("""
        turn on the {room} {device}{please}, turn off the {room} {device},
        switch off the {device} in the {room}, dim the {room} lights to {number} percent,
        make the {room} lights {colour}, set the {room} to {degrees}, start the {appliance}{please},
        start the {appliance} at {time}, is the {opening} closed, open the {opening},
        close the {opening} at {time}, lock the {opening}, turn off everything except the {room} {device},
        turn on the {appliance} in {span}, how warm is it in the {room}""")),
    "shopping": Intent(6, _words("""
        add {item} to my shopping list, add {item} and {item} to the list, put {item} on the shopping list,
        remove {food} from my shopping list, order {quantity} {food}, do we need {item}, we are out of {item},
        how much is {quantity} {food}, find a recipe with {food} and {food}""")),
    "question": Intent(5, _words("""
        what is {number} times {number}, what is {number} plus {number}, how much is {number} {unit_pair},
        how fast can {animal} run, what does {animal} eat, how old can {animal} get,
        how do you say {phrase} in {language}, what is the capital of the country where they speak {language},
        what time is it in {city}, how many people live in {city}""")),
}  # fmt: skip

# Filled slots that a listener could be told beforehand: the contact list and the map.
KEYWORD_SLOTS = ("person", "city", "street")
SENTENCE_WORDS = range(2, 15)


class Sentence(NamedTuple):
    """One request: lower-case words, the intent it came from, and the names and places in it."""

    text: str
    intent: str
    keywords: tuple[str, ...]


def spoken_form(text: str) -> str:
    """Return the text with every name replaced by the first of its group.

    This is what the synthesiser is given, so that names of a group do sound alike (espeak-ng reads `kaitlyn` as
    `kite-lin`), and what decides whether two sentences are the same.
    """
    return " ".join(SOUNDS_LIKE.get(word, word) for word in text.split())


def draw(rng: random.Random) -> Sentence:
    """Draw one sentence of 2 to 14 words; the same generator state gives the same sentences in every Python version."""
    while True:
        intent = _pick(rng, _intent_shares())
        keywords: list[str] = []
        text = _fill(_pick(rng, INTENTS[intent].templates), rng, keywords)
        if len(text.split()) in SENTENCE_WORDS:
            return Sentence(text, intent, tuple(dict.fromkeys(keywords)))


def distinct_sentences(rng: random.Random) -> Iterator[Sentence]:
    """Yield sentences without end, no two of which sound the same."""
    seen: set[str] = set()
    while True:
        sentence = draw(rng)
        spoken = spoken_form(sentence.text)
        if spoken not in seen:
            seen.add(spoken)
            yield sentence


def _fill(template: str, rng: random.Random, keywords: list[str]) -> str:
    """Fill the template's slots from left to right; names and places are added to `keywords`."""
    text = ""
    for literal, slot in _parts(template):
        filled = _fill(_pick(rng, SLOTS[slot]), rng, keywords) if slot else ""
        if slot in KEYWORD_SLOTS:
            keywords.append(filled)
        text += literal + filled
    return text


@cache
def _parts(template: str) -> tuple[tuple[str, str], ...]:
    """Split `call {person} back` into (`call `, `person`), (` back`, ``)."""
    literals_and_slots = [*re.split(r"\{(\w+)\}", template), ""]
    return tuple(zip(literals_and_slots[::2], literals_and_slots[1::2]))


@cache
def _intent_shares() -> tuple[str, ...]:
    """Name every intent as often as it has percent."""
    return tuple(name for name, intent in INTENTS.items() for _ in range(intent.share))


def _pick(rng: random.Random, items: tuple[str, ...]) -> str:
    # random() is the one method whose values Python promises to keep; choice() has changed before.
    return items[int(rng.random() * len(items))]
