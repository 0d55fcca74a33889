#!/bin/sh
# The bucket, and a key that may use it and nothing else. Running it again changes nothing.
set -eu
mc alias set s3 http://objects:9000 "$ROOT_USER" "$ROOT_PASSWORD" >/dev/null
mc mb --ignore-existing s3/artifacts
mc admin user add s3 "$KEY_ID" "$SECRET" >/dev/null
cat >/tmp/policy.json <<'JSON'
{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Effect": "Allow",
      "Action": ["s3:*"],
      "Resource": ["arn:aws:s3:::artifacts", "arn:aws:s3:::artifacts/*"]
    }
  ]
}
JSON
mc admin policy create s3 qlora /tmp/policy.json
mc admin policy attach s3 qlora --user "$KEY_ID" || mc admin policy entities s3 --user "$KEY_ID" | grep -q qlora
