"""The photographs that `offline:photos` names, mapped here so that they are installed with the package; no code."""
