# The Python example handler.
FROM python:3.12-slim
WORKDIR /app
COPY examples/echo-python/requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY proto proto
COPY examples/echo-python examples/echo-python
WORKDIR /app/examples/echo-python
CMD ["python", "handler.py"]
