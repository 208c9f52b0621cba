"""Samples for training and testing: `load.load_data` gives them, `batches.batches` feeds them to the device.

Empty on purpose: the command line reads `user.import_object` from here without waiting for torch.
"""
