"""Using a model: embed, search, classify, and the `clipmini` command. Installed as `clipmini.inference`."""
