"""What leaves the house: formats that other programs load, each checked in a fresh process."""

BUILTIN = {
    "timm": "autopeft.export.timm:TimmExport",
    "peft": "autopeft.export.peft:PeftExport",
    "peft-init": "autopeft.export.peft_init:PeftInitExport",
    "delta": "autopeft.export.delta:DeltaExport",
    "native": "autopeft.export.native:NativeExport",
    "onnx": "autopeft.export.onnx:OnnxExport",
}
