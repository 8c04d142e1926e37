"""How the built-in shapes are put into words: usual wordings, a grammar of very many, and families kept out of it.

A wording is a caption with the places {color}, {shape} and {background} left open. Which color is the shape's and which
the background's is said by order and words alone, so a text tower has to read. Trained on the grammar, it can be asked
in the families below, which the grammar does not derive: does it read, or know sentences by heart?
"""

import functools
import random
import re

# Every wording names all three attributes.
WORDINGS = (
    "a {color} {shape} on a {background} background",
    "a {color} {shape} on {background}",
    "{color} {shape} on {background}",
    "the {color} {shape} on the {background} background",
    "a {color} {shape} in front of a {background} background",
    "a {color} {shape} against a {background} background",
    "{color} {shape}, {background} background",
    "one {color} {shape} and a {background} background",
    "a picture of a {color} {shape} on a {background} background",
    "a drawing of a {color} {shape} on {background}",
    "{background} background, {color} {shape}",
    "a {background} background with a {color} {shape}",
    "on a {background} background, a {color} {shape}",
    "a {shape} in {color} on a {background} background",
    "{shape}, {color}, on {background}",
    "the {shape} is {color} and the background is {background}",
    "the background is {background}, the {shape} is {color}",
    "{background} behind a {color} {shape}",
    "a {color} {shape} with {background} all around",
    "a {background} picture with a {color} {shape} in it",
)

# ------------------------------------------------------------------------------------- families kept out of training

# Other orders and words.
HELD_OUT_WORDINGS = (
    "a {color} {shape} over {background}",
    "there is a {color} {shape} in the middle of a {background} field",
    "a {background} canvas showing a {color} {shape}",
    "this {shape} is {color}, what lies behind it is {background}",
    "a poster: {color} {shape}, all else {background}",
    "{background} everywhere except for a {color} {shape}",
    "a {shape} coloured {color}, surrounded by {background}",
    "a {background} scene containing a single {color} {shape}",
)
# Four relative clauses, each in two words for the same.
RELATIVE_CLAUSES = (
    "a {shape} that is {color} on a background that is {background}",
    "a {shape} which is {color} on a background which is {background}",
    "a {background} background that holds a {color} {shape}",
    "a {background} background which holds a {color} {shape}",
    "a {shape} whose color is {color}, on a background whose color is {background}",
    "a {shape} whose hue is {color}, on a background whose hue is {background}",
    "a {background} background on which there is a {color} {shape}",
    "a {background} background where there is a {color} {shape}",
)
# Four orders in which the background comes first, each in two words for the same. The grammar has other such orders:
# "on a blue page a red star", "blue around a red star", "the page is blue, the star is red".
BACKGROUND_FIRST = (
    "with {background} behind it, a {color} {shape}",
    "with {background} at its back, a {color} {shape}",
    "in front of a {background} wall stands a {color} {shape}",
    "before a {background} wall stands a {color} {shape}",
    "upon {background} rests a {shape} in {color}",
    "atop {background} rests a {shape} in {color}",
    "{background} is the backdrop of a {color} {shape}",
    "{background} is the setting of a {color} {shape}",
)
HELD_OUT_FAMILIES = {
    "other wordings": HELD_OUT_WORDINGS,
    "relative clauses": RELATIVE_CLAUSES,
    "background first": BACKGROUND_FIRST,
}

# --------------------------------------------------------------------------------------------- the grammar of training

# A rule a line: a name, and what may stand for it, alternatives set apart by "|", all equally likely. <name> is another
# rule, everything else stands for itself. No rule leads back to itself, so that all sentences are finite. None of the
# families above can be derived, and most of the words that mark them are not known here. The nouns, qualities and
# doings at the end say nothing of shape, color and background: they are there so that unknown words do no harm. Nor do
# the last ones, of which the small vocabulary makes pieces that end as a color: layered is lay, e, red.
GRAMMAR = """
caption      : <usual> | <sentence> | <sentence> | <sentence>
sentence     : <said> | <said> <end>
said         : <scene> | <scene> | <lead> <scene> | <lead> <scene> | <clauses> | <title> <clauses>

scene        : <object-first> | <object-first> | <ground-first> | <ground-first> | <list>
object-first : <object> <on> <ground> | <object> <on> <ground> | <object>, <ground> | <object> and <ground>
             | <object> <is> <on> <ground> | <object> with <ground> <around> | <object> and <ground> <around>
             | <object>, and <ground> <about-it> | <object>, <around> <ground> | <object> has <ground> <about-it>
             | <object> / <ground> | <a> {shape}, {color}, <on> <ground> | {color}, <a> {shape}, <on> <ground>
ground-first : <ground> with <object> | <ground> with <object> <within> | <ground> and <object> | <ground>, <object>
             | <ground>: <object> | <ground> has <object> <within> | <on> <ground>, <object> | <on> <ground> <object>
             | <about> <object> is <ground> | <ground> <about> <object> | <ground> <around> and <object> <within>
list         : {shape}: {color}, <place>: {background} | <place>: {background}, {shape}: {color}
             | {shape}, {color}, {background} | {color} {shape} {background} | {background}, {color} {shape}
             | <a> {shape}, {color} on {background} | {color} on {background}: <a> {shape}
             | <a> {shape} on <a> <place>, {color} on {background}
             | <a> {shape} and <a> <place>, {color} and {background}

object       : <object-plain> | <object-plain> | <object-after>
object-plain : {color} {shape} | <a> {color} {shape} | <a> <kind> {color} {shape} | <a> {color} <made> {shape}
             | <kind> {color} {shape} | <a> {color}, <kind> {shape}
object-after : <a> {shape} in {color} | {shape} in {color} | <a> <kind> {shape} in {color} | <a> {shape} of {color}
             | <a> {shape} <filled> {color} | <a> {shape} <filled> in {color} | <a> {shape} ({color})
             | <a> {shape} with {color} <paint> | <a> {shape} of {color} <paint> | <a> <kind> {shape} <filled> {color}
kind         : small | large | big | little | bright | plain | simple | solid | flat | lone | clean | sharp
             | <quality>
made         : colored | painted | paper | cardboard | toy | wooden | plastic | glass | steel | <noun>
filled       : painted | drawn | filled | dyed | shaded | tinted | done | printed | colored | <doing>
             | <cut>
paint        : paint | ink | color | chalk | dye | lines | light

ground       : {background} | {background} | <a> {background} <place> | <a> {background} <place>
             | {background} <place> | <a> <pure> {background} <place> | <pure> {background}
             | <a> <place> of {background} | <a> <place> in {background} | <a> <place> <filled> {background}
             | <a> {background} <made> <place>
place        : background | background | background | ground | surface | page | sheet | board | floor | cloth | screen
             | panel | tile | table | plane | area | backing | base | <medium> | <noun> | <noun> | <noun> | <noun>
pure         : plain | solid | pure | all | only | completely | fully | flat | even | uniform | clear | simply
             | <quality>

on           : on | on | on top of | against | in front of | in | across | inside | within | onto | above | amid
             | <put> on | <put> on | <put> in | <put> against | <put> in front of | <put> inside
is           : is | sits | is <put> | was <put> | hangs | appears | can be seen | has been <put> | looks <quality>
put          : painted | drawn | printed | placed | seen | set | put | alone | centered | left | held | found | pasted
             | standing | floating | <doing> | <doing> | <doing>
about        : around | all around | behind | under | beneath | below | outside | on all sides of | at the back of
about-it     : <about> it | <about> the {shape} | <around>
around       : all around | around | behind | on all sides | at the back | outside | underneath | on every side
             | in the background | for <a> background | as <a> background | beneath | below
within       : in it | on it | inside | in the center | in front | on top | within | at its center | <put> on it
             | <put> in it

clauses      : <object-says><and> <ground-says> | <ground-says><and> <object-says>
object-says  : <a> {shape} <seems> {color} | <a> {shape} has <a> {color} <paint> | <a> {shape} has the color {color}
             | the color of <a> {shape} is {color} | <a> {shape}'s color is {color} | {shape}: {color}
             | {shape} {color} | {color} for <a> {shape} | {color} is <a> {shape}
             | {color} is the color of <a> {shape} | it is <a> {color} {shape} | <a> <kind> {shape} <seems> {color}
             | <a> {shape} was <filled> {color} | <a> <put> {shape} <seems> {color}
ground-says  : <rest> <seems> {background} | <rest> has <a> {background} <paint> | <rest> has the color {background}
             | the color of <rest> is {background} | <rest>'s color is {background} | <rest>: {background}
             | <rest> {background} | {background} for <rest> | {background} is <rest>
             | {background} is the color of <rest> | <about> it is {background} | <rest> was <filled> {background}
seems        : is | is | is | is <filled> | seems | looks | appears | is all | comes in | must be | should be | was
rest         : <a> <place> | the <place> | its <place> | <place> | the rest | the remainder | the space around it
             | its surroundings
and          : , | , | and | ; | , and | , but | while | . | but | , while

lead         : <the> <picture> of | <the> <picture> with | <title> | <ask> | <ask> <the> <picture> of | <look>
             | <look>, <the> <picture> of
title        : <the> <picture>: | <picture>: | <picture>, | <look>:
picture      : <medium> | <medium> | <manner> <medium> | <noun>
medium       : picture | drawing | image | photo | photograph | painting | sketch | print | illustration | icon | logo
             | sign | stamp | sticker | symbol | design | render | artwork | pattern | graphic | emblem | card
             | figure
manner       : simple | plain | small | large | nice | minimal | colorful | digital | flat | old | new | clean
             | <quality>
ask          : draw | paint | make | show me | give me | please draw | please paint | I want | I would like | we need
             | can you draw
look         : here is | here you see | I see | we see | you can see | look at | behold | now | next | again
end          : . | ! | , please | , <manner> | , <manner> <medium> | , in <manner> style | , as <the> <medium>

the          : the | a | one | some | my | our | each | every | another | your
a            : a | a | a | a | the | the | the | one | some | my | our | another | her | his
noun         : door | carpet | water | grass | plate | blanket | house | garden | river | shirt | window | market
             | letter | table | summer | morning | engine | basket | mirror | forest | pillow | curtain | street
             | bottle | corner | town | dream | music | valley | bread | lamp | candle | ocean | bridge | jacket
             | ticket | silver | desert | kitchen | meadow | snow | smoke | velvet | marble | ceiling | roof | beach
             | lawn | wood | stone | metal | dust | cloud | island | winter | coffee | doctor | castle | planet
             | village | tunnel | harbor | station | library | museum | orchard | cottage | railway | balcony
             | leather | cotton | copper | granite | sugar | butter | paradise | horizon | journal | calendar | atlas
             | menu | banner | puzzle | bucket | cabin | mountain
quality      : pretty | quiet | gentle | modern | famous | lovely | heavy | lucky | gigantic | tiny | fresh | ancient
             | strange | elegant | funny | tidy | smooth | rough | perfect | ordinary | cheerful | classic | vivid
             | crisp | careful | certain | special | secret | proud | brave | royal | gloomy | noble | delicate
             | enormous | patient | honest | sleepy | magic
doing        : glued | hung | pinned | cut out | shown | sitting | laid | waiting | sleeping | spinning | carved
             | knitted | stitched | resting | dancing | hiding | leaning | lying | swimming | turning | pressed
             | stuck | dropped | posing | smiling | traveling | meeting | carrying | wearing | keeping | touching
             | watching | facing | escaping | marked | wrapped | folded | enclosed | isolated | embedded | drifting
             | <cut> | <cut> | <cut>
cut          : mirrored | layered | numbered | flavored | tailored | anchored | feathered | checkered | wired | cured
             | sacred | tired
"""


@functools.cache
def rules() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the grammar: rule -> alternatives -> symbols, of which <name> is a rule and all others are words."""
    lines = filter(None, re.sub(r"\n +\|", " |", GRAMMAR).splitlines())
    sides = (line.partition(":") for line in lines)
    read = {name.strip(): tuple(map(_symbols, right.split("|"))) for name, _, right in sides}
    return {"usual": tuple(map(_symbols, WORDINGS)), **read}


def derived(rng: random.Random, rule: str = "caption") -> str:
    """Return a wording that the grammar derives from a rule, chosen by `rng.random()` alone."""
    return _spelled(_expanded(rng, rule))


def _expanded(rng: random.Random, rule: str) -> list[str]:
    alternatives = rules()[rule]
    chosen = alternatives[int(rng.random() * len(alternatives))]
    return [word for symbol in chosen for word in (_expanded(rng, symbol[1:-1]) if _is_rule(symbol) else [symbol])]


def is_derived(wording: str, rule: str = "caption") -> bool:
    """Return whether the grammar derives a wording, whatever its case and spaces."""
    words = _symbols(wording)

    @functools.cache
    def ends(symbol: str, start: int) -> frozenset[int]:
        """Return where in the words a symbol that begins at `start` can end."""
        if not _is_rule(symbol):
            return frozenset([start + 1] if words[start : start + 1] == (symbol,) else [])
        found: set[int] = set()
        for alternative in rules()[symbol[1:-1]]:
            reached = {start}
            for part in alternative:
                reached = {end for begin in reached for end in ends(part, begin)}
            found |= reached
        return frozenset(found)

    return len(words) in ends(f"<{rule}>", 0)


def vocabulary() -> set[str]:
    """Return the words of the grammar, punctuation and places included."""
    every = (symbol for alternatives in rules().values() for symbols in alternatives for symbol in symbols)
    return {symbol for symbol in every if not _is_rule(symbol)}


def _symbols(text: str) -> tuple[str, ...]:
    """Return rules, places, words and punctuation marks of a text, in small letters."""
    return tuple(re.findall(r"<[a-z-]+>|\{\w+\}|'s|\w+|[^\w\s]", text.lower()))


def _is_rule(symbol: str) -> bool:
    return symbol.startswith("<")


def _spelled(words: list[str]) -> str:
    """Return words and marks as a text."""
    return re.sub(r" (?=[,.;:!)]|'s)|(?<=\() ", "", " ".join(words))
