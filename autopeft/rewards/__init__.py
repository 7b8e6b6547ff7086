"""Outcomes to numbers."""

BUILTIN = {
    "amd": "autopeft.rewards.amd:AMD",
    "bytes": "autopeft.rewards.size:Bytes",
    "calibration": "autopeft.rewards.calibration:Calibration",
    "cmmd": "autopeft.rewards.cmmd:CMMD",
    "denoising_loss": "autopeft.rewards.denoising_loss:DenoisingLoss",
    "extraction": "autopeft.rewards.extraction:Extraction",
    "fid": "autopeft.rewards.fid:FID",
    "forgetting": "autopeft.rewards.forgetting:Forgetting",
    "joint": "autopeft.rewards.joint:Joint",
    "kid": "autopeft.rewards.kid:KID",
    "latency": "autopeft.rewards.latency:Latency",
    "metric": "autopeft.rewards.metric:Metric",
    "metric_with_cost": "autopeft.rewards.cost:MetricWithCost",
    "mifid": "autopeft.rewards.mifid:MiFID",
    "noise_difference": "autopeft.rewards.noise_difference:NoiseDifference",
    "parameters": "autopeft.rewards.parameters:Parameters",
}
