"""The gRPC messages between a site's ClientApp and its trainer.

``trainer_pb2*.py`` are generated from ``trainer.proto`` by ``python -m colora.client.trainer_service.proto.generate``.
"""
