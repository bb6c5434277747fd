"""`/v1/capabilities`: what live workers offer."""

from __future__ import annotations

from fastapi import APIRouter

from app.capabilities.schemas import CapabilitiesOut
from app.http.deps import ServicesDep, TenantId

router = APIRouter(prefix="/capabilities", tags=["capabilities"])


@router.get("", response_model=CapabilitiesOut)
def get_capabilities(services: ServicesDep, _tenant_id: TenantId) -> CapabilitiesOut:
    """Devices, hardware, backends, precisions and formats of the workers that are there now."""
    return CapabilitiesOut.of(services.capabilities.live())
