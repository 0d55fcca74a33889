"""The whole system on one machine without containers: `python -m infra.loopback` from the repository's root.

Databases, servers, cluster and vote page are the real ones that `infra/compose` names; only the S3 server is a small
one that keeps its objects in memory. Every port is on the loopback interface and asks for a credential made for this
start.
"""
