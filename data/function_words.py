"""Words that any sentence shares with any other: they tell no topic, and to emit one says nothing of copying."""

_ENGLISH = """
a about after again all also am an and any are as at be been before being but by can could d did do does doing done down
for from get go going got had has have having he her here hers him his how i if in into is it its just let like ll m may
me might mine more most my no nor not now of off on one or other our out over please re s shall she should so some such
t than that the their them then there these they this those through to too under until up us ve very was we were what
when where which while who whom whose why will with would yes you your"""
_GERMAN = "der die das den dem des ein eine einen einem einer und oder mit von zu im auf ist sind nicht ich du er sie"
_FRENCH = "le la les un une de du et ou avec en dans sur est sont pas je tu il elle nous vous"
_SPANISH = "el los las uno una y o con por para son que se al"
FUNCTION_WORDS = frozenset(" ".join((_ENGLISH, _GERMAN, _FRENCH, _SPANISH)).split())
