"""How the built-in shapes are put into words: the usual wordings, a grammar of many more, and families kept out of it.

A wording is a caption with the places {color}, {shape} and {background} left open. Which color is the shape's and which
the background's is said by order and words alone, so a text tower has to read. A tower that was trained on the grammar
can be asked in the families below, which the grammar does not derive: whether it reads or knows sentences by heart.
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
# Four orders in which the background comes first, each in two words for the same.
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
