"""The kinds of trainable parts; one file each."""

BUILTIN = {
    "adapter": "autopeft.methods.bottleneck:BottleneckAdapter",
    "bias": "autopeft.methods.bias:Bias",
    "block_adapter": "autopeft.methods.block_adapter:BlockAdapter",
    "core": "autopeft.methods.core:Core",
    "dora": "autopeft.methods.dora:DoRA",
    "flora": "autopeft.methods.flora:FLoRA",
    "loldu": "autopeft.methods.loldu:LoLDU",
    "lora": "autopeft.methods.lora:LoRA",
    "norm": "autopeft.methods.norm:Norm",
    "peft": "autopeft.methods.hf_peft:HfPeft",
    "pego": "autopeft.methods.pego:PEGO",
    "s2ft": "autopeft.methods.s2ft:S2FT",
    "sparse": "autopeft.methods.sparse:Sparse",
    "ssf": "autopeft.methods.ssf:SSF",
    "svdiff": "autopeft.methods.svdiff:SVDiff",
    "svfit": "autopeft.methods.svfit:SVFit",
    "tlora": "autopeft.methods.tlora:TLoRA",
    "tokens": "autopeft.methods.tokens:Tokens",
    "vector": "autopeft.methods.vector:Vector",
}
