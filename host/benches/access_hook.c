// A plug-in for the benchmark `access`: claims two ranges of region 0 and answers reads of a register with a constant.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

#include "vfio_mediate.h"

#include <errno.h>
#include <string.h>

#define TEXT(s) { (const uint8_t *)(s), sizeof(s) - 1 }

static int32_t rw(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx,
                  struct vfio_mediate_access *access)
{
    (void)state;
    (void)data;
    (void)ctx;
    static const uint64_t value = 0x0101010101010101;

    if (access->write || access->length != sizeof(value))
        return -EINVAL;
    memcpy(access->data, &value, sizeof(value));
    return VFIO_MEDIATE_VERDICT_HANDLED;
}

static const struct vfio_mediate_region_hooks hooks = {
    .struct_size = sizeof(hooks),
    .rw = rw,
};

#define CLAIM(at)                                                                                                       \
    {                                                                                                                   \
        .struct_size = sizeof(struct vfio_mediate_region_claim), .region = 0, .offset = (at), .length = 64,             \
        .maps = VFIO_MEDIATE_MAP_NORMAL | VFIO_MEDIATE_MAP_TRACKING, .hooks = &hooks,                                   \
    }

static const struct vfio_mediate_region_claim claims[] = { CLAIM(0), CLAIM(256) };

static int32_t open_device(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx,
                           const struct vfio_mediate_device_identity *identity, struct vfio_mediate_device_ops *ops)
{
    (void)state;
    (void)ctx;
    (void)identity;
    *ops = (struct vfio_mediate_device_ops){
        .struct_size = sizeof(*ops),
        .regions = claims,
        .region_count = sizeof(claims) / sizeof(claims[0]),
    };
    return 0;
}

static const struct vfio_mediate_device_match matches[] = {
    { 0x1234, VFIO_MEDIATE_ANY_ID, VFIO_MEDIATE_ANY_ID, VFIO_MEDIATE_ANY_ID },
};

static const struct vfio_mediate_plugin plugin = {
    .struct_size = sizeof(plugin),
    .name = TEXT("access-hook"),
    .version = TEXT("0.1.0"),
    .vendor = TEXT("the benchmark"),
    .matches = matches,
    .match_count = sizeof(matches) / sizeof(matches[0]),
    .open = open_device,
};

const struct vfio_mediate_entry vfio_mediate_plugin = {
    .magic = VFIO_MEDIATE_ENTRY_MAGIC,
    .struct_size = sizeof(vfio_mediate_plugin),
    .abi_major = VFIO_MEDIATE_ABI_MAJOR,
    .abi_minor = VFIO_MEDIATE_ABI_MINOR,
    .fingerprint = VFIO_MEDIATE_ABI_FINGERPRINT,
    .plugin = &plugin,
};
