"""Runtime: makes an engine with weights callable on a device.

It imports nothing of lowering or the backend, so that an application which only loads engines needs neither.
"""
