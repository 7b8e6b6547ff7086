"""What shapes training besides the loss of the task: terms added to it, and changes of its gradients."""

BUILTIN: dict[str, str] = {
    "nuclear_norm": "autopeft.regularisers.nuclear_norm:NuclearNorm",
}
