"""The families of models that can be exported, a file each."""
