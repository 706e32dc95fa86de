"""A finished run on the Hub: what is pushed, its model card, and the push itself."""

from dip_hf.hub.push import HubError, push
from dip_hf.hub.settings import PushSettings


__all__ = ["HubError", "PushSettings", "push"]
