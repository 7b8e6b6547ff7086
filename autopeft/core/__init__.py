"""Values and contracts. Nothing here imports torch, timm, optuna or peft."""
