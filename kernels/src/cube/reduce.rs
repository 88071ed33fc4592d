//! Sums and maxima over a cube.

use cubecl::prelude::*;

/// Returns the sum of all units' values, the same to each; `scratch` holds a value a plane.
#[cube]
pub fn cube_sum(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let sum = plane_sum(value);
    sync_cube();
    if UNIT_POS_PLANE == 0 {
        scratch[(UNIT_POS_X / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    let mut total = 0.0f32;
    for plane in 0..CUBE_DIM_X / PLANE_DIM {
        total += scratch[plane as usize];
    }
    total
}

/// Returns the largest of all units' values, the same to each.
#[cube]
pub fn cube_max(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let largest = plane_max(value);
    sync_cube();
    if UNIT_POS_PLANE == 0 {
        scratch[(UNIT_POS_X / PLANE_DIM) as usize] = largest;
    }
    sync_cube();
    let mut total = scratch[0];
    for plane in 1..CUBE_DIM_X / PLANE_DIM {
        total = max(total, scratch[plane as usize]);
    }
    total
}
