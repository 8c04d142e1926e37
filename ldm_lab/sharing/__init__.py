"""Models that travel: a folder to sample from offline, its model card, and pipelines of diffusers.

`parts`       the frozen parts of a model as files in the folder
`facts`       what is known of how a model came about
`card`        the model card (README.md)
`comfyui`     what ComfyUI can load of them
`checks`      what can be told of an export before it begins
`evaluation`  the results of `evaluate` for the card
`hub`         the folder

`standalone`        our code as the text of one module, with all that it calls
`stand_ins`         what stands in for the rest of the program there
`diffusers_folder`  a folder of diffusers', with such code in it; `diffusers_code/` has the texts of its other files
"""
