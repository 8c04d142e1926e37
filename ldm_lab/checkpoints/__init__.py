"""Weights in and out: safe reading, our own files, importers of other programs' checkpoints.

`opened`       a file of weights, opened once, whatever its container
`importer`     the contract and the registry of importers; `detect_format`
`formats`      one importer a file: the formats of other programs
`native`       our own files: parts, models, checkpoints of runs
`parts`        a frozen part from its config, whoever wrote its weights
`models`       a trained diffusion model out of a file of any format
`embedders`    whose embeddings these are
`lookalikes`   files that are no weights, by name
`wrappers`     what training programs put around a state dict
`folders`      which file in a folder has the weights
`files`, `safe_pickle`, `torchscript`, `released_zip`, `sharded`, `third_party`   the containers
`saved_model`, `tensor_bundle`, `wire`   Keras's models as TensorFlow stores them

Every file that is read is treated as hostile: safetensors, `weights_only=True`, a restricted unpickler.
"""
