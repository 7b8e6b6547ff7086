"""What leaves the house: formats that other programs load, each checked in a fresh process."""

BUILTIN = {
    "timm": "autopeft.export.timm:TimmExport",
    "peft": "autopeft.export.peft:PeftExport",
    "peft-init": "autopeft.export.peft_init:PeftInitExport",
    "delta": "autopeft.export.delta:DeltaExport",
    "native": "autopeft.export.native:NativeExport",
    "diffusers": "autopeft.export.diffusers:DiffusersExport",
    "diffusers-lora": "autopeft.export.diffusers_lora:DiffusersLoRAExport",
    "onnx": "autopeft.export.onnx:OnnxExport",
}
