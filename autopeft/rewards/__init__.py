"""Outcomes to numbers."""

BUILTIN = {
    "metric": "autopeft.rewards.metric:Metric",
    "metric_with_cost": "autopeft.rewards.cost:MetricWithCost",
}
