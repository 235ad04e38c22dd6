"""The variables that kubelet adds to the containers of each pod (`enableServiceLinks`), for each Service."""

from __future__ import annotations


def service_links(service: str, port: int = 8080, port_name: str = "http") -> dict[str, str]:
    """Those of one Service with one port, as `envvars.FromServices` of Kubernetes makes them."""
    name, address = service.upper().replace("-", "_"), "10.96.0.17"
    link = f"{name}_PORT_{port}_TCP"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_{port_name.upper()}": str(port),
        f"{name}_PORT": f"tcp://{address}:{port}",
        link: f"tcp://{address}:{port}",
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": str(port),
        f"{link}_ADDR": address,
    }
