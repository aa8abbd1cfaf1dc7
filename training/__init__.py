"""Making a model: data, training, evaluation, publishing. Installed as `clipmini.training`."""
