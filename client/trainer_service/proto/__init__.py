"""The wire between a site's thin ClientApp and its resident trainer.

``trainer_pb2*.py`` are generated from ``trainer.proto`` by ``python -m colora.client.trainer_service.proto.generate``.
"""
