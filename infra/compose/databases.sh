#!/bin/sh
# Run once by the Postgres image on an empty data folder: a role for each server, with its own password and databases.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv prefect PREFECT_PASSWORD
\getenv mlflow MLFLOW_PASSWORD
\getenv studies STUDIES_PASSWORD
CREATE ROLE prefect LOGIN PASSWORD :'prefect';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE studies LOGIN PASSWORD :'studies';
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_users OWNER mlflow;
CREATE DATABASE studies OWNER studies;
REVOKE ALL ON DATABASE prefect, mlflow, mlflow_users, studies FROM PUBLIC;
SQL
