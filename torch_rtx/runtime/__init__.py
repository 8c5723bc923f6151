"""Runtime: an engine and its weights on a device, made callable.

May import `engine`, `ir`, `aten`, `settings` and `errors`; nothing of lowering's passes or of the backend, so that an
application which only loads engines needs neither.
"""
