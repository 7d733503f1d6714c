# MLflow's server with users and passwords, for mlflow-compose.yaml and kubernetes/mlflow.yaml.
#
#   docker build -f cluster/mlflow.Dockerfile -t ghcr.io/pointsman/mlflow:3.17.2 cluster
FROM python:3.11-slim
# boto3: artifacts in S3 or a store that speaks its language.
RUN pip install --no-cache-dir "mlflow[auth]==3.17.2" "psycopg[binary]" boto3
RUN useradd --uid 10001 --create-home mlflow && mkdir /artifacts /users && chown mlflow /artifacts /users
USER 10001
