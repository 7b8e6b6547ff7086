"""Sensitivity and importance: one file per scorer, a value for every place of the model."""

BUILTIN = {
    "fisher": "autopeft.scoring.fisher:Fisher",
    "gradient": "autopeft.scoring.gradient:Gradient",
    "magnitude": "autopeft.scoring.magnitude:Magnitude",
    "random": "autopeft.scoring.random:Random",
}
