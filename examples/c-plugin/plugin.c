// A vfio-mediate plug-in in C, for QEMU's edu device (1234:11e8).
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// It mediates the liveness register at 0x04 of BAR 0, counts the client's accesses to it, and shows the counts in a region
// that it adds. It neither migrates the device nor tracks its dirty pages.
//
// Hooks run concurrently on any thread: what they share is atomic. What `open` publishes lives until `close` returns.

#include "vfio_mediate.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define EDU_VENDOR 0x1234
#define EDU_DEVICE 0x11e8
#define LIVENESS 0x04
#define LIVENESS_SIZE 4

// The added region: two little-endian counters of 8 bytes, reads and writes.
#define COUNTERS_SIZE 16
#define REGION_FLAG_READ 1

#define TEXT(s) { (const uint8_t *)(s), sizeof(s) - 1 }

struct edu {
    const struct vfio_mediate_host_services *services;
    _Atomic uint64_t reads;
    _Atomic uint64_t writes;
    struct vfio_mediate_region_claim claim;
    struct vfio_mediate_extra_region counters;
};

static void say(const struct vfio_mediate_host_services *services, uint32_t level, const char *message)
{
    struct vfio_mediate_bytes target = TEXT("c_plugin");
    struct vfio_mediate_bytes text = { (const uint8_t *)message, strlen(message) };

    services->log(level, target, text);
}

// The device answers (edu stores the complement of what is written); we look at the result and count.
static int32_t liveness_rw(vfio_mediate_opaque state, vfio_mediate_opaque data,
                           const struct vfio_mediate_call_context *ctx, struct vfio_mediate_access *access)
{
    struct edu *edu = state;
    int32_t status;

    (void)data;
    status = ctx->services->default_rw(ctx, access);
    if (status < 0)
        return status;
    atomic_fetch_add(access->write ? &edu->writes : &edu->reads, 1);
    return VFIO_MEDIATE_VERDICT_HANDLED;
}

static int32_t counters_rw(vfio_mediate_opaque state, vfio_mediate_opaque data,
                           const struct vfio_mediate_call_context *ctx, struct vfio_mediate_access *access)
{
    struct edu *edu = state;
    uint64_t counters[2];
    uint8_t bytes[COUNTERS_SIZE];

    (void)data;
    (void)ctx;
    if (access->write)
        return -EPERM;
    // Inside the region by the host's promise; checked all the same, since it costs nothing.
    if (access->offset > COUNTERS_SIZE || access->length > COUNTERS_SIZE - access->offset)
        return -EINVAL;
    counters[0] = atomic_load(&edu->reads);
    counters[1] = atomic_load(&edu->writes);
    for (size_t i = 0; i < COUNTERS_SIZE; i++)
        bytes[i] = (uint8_t)(counters[i / 8] >> (i % 8 * 8));
    memcpy(access->data, bytes + access->offset, access->length);
    return VFIO_MEDIATE_VERDICT_HANDLED;
}

static const struct vfio_mediate_region_hooks liveness_hooks = {
    .struct_size = sizeof(struct vfio_mediate_region_hooks),
    .rw = liveness_rw,
};

static const struct vfio_mediate_region_hooks counters_hooks = {
    .struct_size = sizeof(struct vfio_mediate_region_hooks),
    .rw = counters_rw,
};

// What the plug-in needs for all its devices: the host's services, for messages without a context.
static int32_t init(const struct vfio_mediate_host_services *services, vfio_mediate_opaque *state)
{
    if (services->abi_major != VFIO_MEDIATE_ABI_MAJOR || services->struct_size < sizeof(*services))
        return -EOPNOTSUPP;
    *state = (vfio_mediate_opaque)services;
    return 0;
}

// Asked about everything of this vendor (see `matches`), mine is edu alone.
static int32_t probe(vfio_mediate_opaque state, const struct vfio_mediate_device_identity *identity)
{
    (void)state;
    if (identity->vendor_id == EDU_VENDOR && identity->device_id == EDU_DEVICE)
        return VFIO_MEDIATE_PROBE_CLAIM;
    return VFIO_MEDIATE_PROBE_DECLINE;
}

static void close_device(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx)
{
    say(ctx->services, VFIO_MEDIATE_LOG_DEBUG, "closed");
    free(state);
}

static int32_t open_device(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx,
                           const struct vfio_mediate_device_identity *identity, struct vfio_mediate_device_ops *ops)
{
    struct edu *edu;

    (void)identity;
    (void)ctx;
    if (ops->struct_size < sizeof(*ops))
        return -EOPNOTSUPP;
    edu = calloc(1, sizeof(*edu));
    if (!edu)
        return -ENOMEM;
    edu->services = state;
    edu->claim = (struct vfio_mediate_region_claim){
        .struct_size = sizeof(edu->claim),
        .region = 0,
        .offset = LIVENESS,
        .length = LIVENESS_SIZE,
        .maps = VFIO_MEDIATE_MAP_NORMAL | VFIO_MEDIATE_MAP_TRACKING,
        .hooks = &liveness_hooks,
    };
    edu->counters = (struct vfio_mediate_extra_region){
        .struct_size = sizeof(edu->counters),
        .flags = REGION_FLAG_READ,
        .size = COUNTERS_SIZE,
        .type_ = EDU_VENDOR | 1u << 31, // VFIO_REGION_TYPE_PCI_VENDOR_TYPE
        .subtype = 1,
        .hooks = &counters_hooks,
    };
    *ops = (struct vfio_mediate_device_ops){
        .struct_size = sizeof(*ops),
        .state = edu,
        .regions = &edu->claim,
        .region_count = 1,
        .extra_regions = &edu->counters,
        .extra_region_count = 1,
        .close = close_device,
    };
    say(edu->services, VFIO_MEDIATE_LOG_DEBUG, "opened");
    return 0;
}

static const struct vfio_mediate_device_match matches[] = {
    { EDU_VENDOR, VFIO_MEDIATE_ANY_ID, VFIO_MEDIATE_ANY_ID, VFIO_MEDIATE_ANY_ID },
};

static const struct vfio_mediate_plugin plugin = {
    .struct_size = sizeof(plugin),
    .name = TEXT("c-edu"),
    .version = TEXT("0.1.0"),
    .vendor = TEXT("an example in C"),
    .matches = matches,
    .match_count = sizeof(matches) / sizeof(matches[0]),
    .init = init,
    .probe = probe,
    .open = open_device,
};

// The one exported symbol.
const struct vfio_mediate_entry vfio_mediate_plugin = {
    .magic = VFIO_MEDIATE_ENTRY_MAGIC,
    .struct_size = sizeof(vfio_mediate_plugin),
    .abi_major = VFIO_MEDIATE_ABI_MAJOR,
    .abi_minor = VFIO_MEDIATE_ABI_MINOR,
    .fingerprint = VFIO_MEDIATE_ABI_FINGERPRINT,
    .plugin = &plugin,
};
