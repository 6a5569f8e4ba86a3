"""When the optimizer runs. One file per policy; so far: `sync`, inside `engine.step()`."""
