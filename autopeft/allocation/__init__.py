"""Ways to spend a budget: from a menu of options to an allocation."""

BUILTIN = {
    "knapsack": "autopeft.allocation.knapsack:Knapsack",
    "uniform": "autopeft.allocation.uniform:Uniform",
    "random": "autopeft.allocation.random:RandomMix",
    "spt": "autopeft.allocation.spt:SPT",
    "mask": "autopeft.allocation.mask:Mask",
    "head_only": "autopeft.allocation.head_only:HeadOnly",
}
