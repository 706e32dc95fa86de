"""PEFT's own tests/test_custom_models.py on the DIPNet adapter; see conftest.py."""

from tests.conformance import peft_suite


globals().update({name: value for name, value in vars(peft_suite.load()).items() if name.startswith("Test")})
