"""The ways to put trainable parts into a model."""

BUILTIN = {
    "hf_peft": "autopeft.backends.hf_peft:HfPeftBackend",
    "native": "autopeft.backends.native:Native",
}
