"""From an extracted model to a folder and back: the spec, the files, and the loader behind timm.create_model."""
