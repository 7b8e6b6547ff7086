"""Sensitivity and importance: one file per scorer, a value for every place of the model."""

BUILTIN = {
    "calibrated": "autopeft.scoring.calibrated:Calibrated",
    "eva": "autopeft.scoring.eva:EVA",
    "fisher": "autopeft.scoring.fisher:Fisher",
    "gradient": "autopeft.scoring.gradient:Gradient",
    "grasp": "autopeft.scoring.grasp:GraSP",
    "magnitude": "autopeft.scoring.magnitude:Magnitude",
    "nvit": "autopeft.scoring.nvit:NViT",
    "random": "autopeft.scoring.random:Random",
    "sensitivity": "autopeft.scoring.sensitivity:Sensitivity",
    "snip": "autopeft.scoring.snip:SNIP",
}
