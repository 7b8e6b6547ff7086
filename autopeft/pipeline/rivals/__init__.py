"""The contenders: what people would do at the same budget; one file each, or one per family."""

BUILTIN = {
    "adalora": "autopeft.pipeline.rivals.adalora:AdaLoRA",
    "bitfit": "autopeft.pipeline.rivals.everywhere:BitFit",
    "dora": "autopeft.pipeline.rivals.uniform:UniformDoRA",
    "eva": "autopeft.pipeline.rivals.uniform:UniformEVA",
    "full": "autopeft.pipeline.rivals.full:FullTuning",
    "head_only": "autopeft.pipeline.rivals.head_only:Probe",
    "norm": "autopeft.pipeline.rivals.everywhere:NormTuning",
    "prunepeft": "autopeft.pipeline.rivals.prunepeft:PrunePEFT",
    "random_mix": "autopeft.pipeline.rivals.random_mix:RandomMixes",
    "s3delta": "autopeft.pipeline.rivals.s3delta:S3Delta",
    "single_method": "autopeft.pipeline.rivals.everywhere:BestSingle",
    "snell": "autopeft.pipeline.rivals.uniform:UniformSNELL",
    "spt_adapter": "autopeft.pipeline.rivals.spt:SPTAdapter",
    "spt_lora": "autopeft.pipeline.rivals.spt:SPTLoRA",
    "ssf": "autopeft.pipeline.rivals.everywhere:ScaleShift",
    "uniform_core": "autopeft.pipeline.rivals.everywhere:UniformCore",
    "uniform_lora": "autopeft.pipeline.rivals.uniform:UniformLoRA",
}
