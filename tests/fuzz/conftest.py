from hypothesis import HealthCheck, settings

checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "short", max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=checks
)
settings.register_profile(
    "long", max_examples=15_000, database=None, deadline=None, suppress_health_check=checks
)
settings.load_profile("short")
