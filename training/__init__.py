"""Making a model; `run` is one run, top to bottom. Installed as `clipmini.training`."""
