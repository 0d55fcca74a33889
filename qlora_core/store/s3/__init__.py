"""The store in an S3 bucket: blobs in verified parts both ways, records by conditional writes, errors in words."""
