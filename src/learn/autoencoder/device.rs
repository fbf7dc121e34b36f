use candle_core::{Device, Result};

/// A GPU where the build has the feature `cuda` or `metal` and the machine has one; else the CPU.
pub(super) fn best() -> Result<Device> {
    if candle_core::utils::cuda_is_available() {
        Device::new_cuda(0)
    } else if candle_core::utils::metal_is_available() {
        Device::new_metal(0)
    } else {
        Ok(Device::Cpu)
    }
}
