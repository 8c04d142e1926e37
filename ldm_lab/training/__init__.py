"""Training: LightningModules (the tasks) and what stands around them.

`task`        what all tasks share: optimizer, EMA, repeatable random numbers, checkpoint contents
`diffusion`, `autoencoder`, `cloob`   one task each; `training_step` is where the loss is computed
`runner`      config -> task, data and Trainer; the run's folder
`checkpointing`, `resume`, `demo`, `logs`, `interrupt`   one concern each, as a callback or a config section
`disk`        room for the checkpoints, before the run starts
"""

import ldm_lab.lean_imports  # noqa: F401  # before Lightning
