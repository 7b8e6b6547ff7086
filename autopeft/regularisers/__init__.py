"""What shapes training besides the loss of the task: terms added to it, and changes of its gradients."""

BUILTIN: dict[str, str] = {
    "consistency": "autopeft.regularisers.consistency:Consistency",
    "distillation": "autopeft.regularisers.distillation:Distillation",
    "dr_tune": "autopeft.regularisers.dr_tune:DRTune",
    "gradient_dropout": "autopeft.regularisers.gradient_dropout:GradientDropout",
    "l2_start": "autopeft.regularisers.l2_start:L2Start",
    "nuclear_norm": "autopeft.regularisers.nuclear_norm:NuclearNorm",
    "orthogonality": "autopeft.regularisers.orthogonality:Orthogonality",
}
