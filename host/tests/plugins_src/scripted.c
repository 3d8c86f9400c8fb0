// A plug-in that does what a test tells it to, and remembers what was done to it.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// The test hands over a `struct script` by the address in the first eight bytes of a device's configuration space; the last
// one seen also gets to know of `retire`. What has to be known before a device is seen is a macro.

#include "vfio_mediate.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef NAME
#define NAME "scripted"
#endif
#ifndef VERSION
#define VERSION "1.0.0"
#endif
#ifndef VENDOR
#define VENDOR "the tests"
#endif
#ifndef MAGIC
#define MAGIC VFIO_MEDIATE_ENTRY_MAGIC
#endif
#ifndef MAJOR
#define MAJOR VFIO_MEDIATE_ABI_MAJOR
#endif
#ifndef MINOR
#define MINOR VFIO_MEDIATE_ABI_MINOR
#endif
#ifndef ENTRY_SIZE
#define ENTRY_SIZE sizeof(struct vfio_mediate_entry)
#endif
#ifndef PLUGIN_SIZE
#define PLUGIN_SIZE sizeof(struct vfio_mediate_plugin)
#endif
#ifndef FINGERPRINT
#define FINGERPRINT VFIO_MEDIATE_ABI_FINGERPRINT
#endif
#ifndef FLAGS
#define FLAGS 0
#endif
#ifndef MATCH_DEVICE
#define MATCH_DEVICE VFIO_MEDIATE_ANY_ID
#endif
#ifndef MATCH_COUNT
#define MATCH_COUNT 1
#endif
#ifndef INIT_ANSWER
#define INIT_ANSWER 0
#endif

#ifndef HAS_OPEN
#define HAS_OPEN 1
#endif

#define TEXT(s) { (const uint8_t *)(s), sizeof(s) - 1 }
#define VENDOR_ID 0x1af4

// In step with `Script` in tests/support/mod.rs; a test compares the sizes.
struct script {
    uint64_t size;
    _Atomic int32_t probe_answer;
    _Atomic int32_t open_answer;
    _Atomic int32_t rw_answer;
    _Atomic int32_t set_state_answer;
    _Atomic uint32_t actual_state;
    _Atomic int32_t save_answer;
    _Atomic uint64_t save_length;
    // What open publishes: see `spoil`
    _Atomic uint32_t spoiled;
    // What rw does besides answering: see `rw`
    _Atomic uint32_t deed;
    _Atomic uint64_t argument;
    _Atomic int32_t deed_status;
    // While it is not 0, open and rw do not return
    _Atomic uint32_t closed_gate;
    _Atomic uint32_t inside;
    // What was called, how often
    _Atomic uint32_t probes;
    _Atomic uint32_t opens;
    _Atomic uint32_t closes;
    _Atomic uint32_t accesses;
    _Atomic uint32_t retires;
    _Atomic uint32_t after_retire;
    _Atomic uint64_t stale_context;
};

static _Atomic uint32_t retired;
static struct script *_Atomic last;

struct device {
    struct script *script;
    struct vfio_mediate_region_claim claims[2];
    struct vfio_mediate_irq_claim irqs[2];
    struct vfio_mediate_extra_region extra;
    struct vfio_mediate_extra_irq extra_irq;
    struct vfio_mediate_region_hooks hooks;
    struct vfio_mediate_irq_hooks irq_hooks;
    struct vfio_mediate_migration_ops migration;
    struct vfio_mediate_dirty_ops dirty;
};

static void look(struct script *script)
{
    if (atomic_load(&retired))
        atomic_fetch_add(&script->after_retire, 1);
}

static void wait_at_gate(struct script *script)
{
    atomic_fetch_add(&script->inside, 1);
    while (atomic_load(&script->closed_gate))
        sched_yield();
    atomic_fetch_sub(&script->inside, 1);
}

static struct script *script_of(const struct vfio_mediate_device_identity *identity)
{
    struct script *script = NULL;

    if (identity->config.len >= sizeof(script))
        memcpy(&script, identity->config.ptr, sizeof(script));
    if (script && script->size != sizeof(*script))
        abort();
    return script;
}

enum { DEED_NONE, DEED_KEEP_CONTEXT, DEED_USE_STALE, DEED_NULL_CONTEXT, DEED_NULL_DATA, DEED_HUGE, DEED_WRAP, DEED_FORGED,
       DEED_SCRATCH, DEED_SHORT_INFO, DEED_BAD_IRQS, DEED_DEFAULT, DEED_FILL, DEED_LOG, DEED_REQUEST, DEED_TAMPER };

static int32_t deed(struct script *script, const struct vfio_mediate_call_context *ctx,
                    struct vfio_mediate_access *access)
{
    const struct vfio_mediate_host_services *services = ctx->services;
    uint64_t argument = atomic_load(&script->argument);
    uint8_t bytes[8] = { 0 };

    switch (atomic_load(&script->deed)) {
    case DEED_USE_STALE:
        return services->region_read((const void *)(uintptr_t)atomic_load(&script->stale_context), 0, 0, bytes, 8);
    case DEED_NULL_CONTEXT:
        return services->region_read(NULL, 0, 0, bytes, 8);
    case DEED_NULL_DATA:
        return services->region_read(ctx, 0, 0, NULL, 8);
    case DEED_HUGE:
        return services->region_write(ctx, 0, 0, bytes, argument);
    case DEED_WRAP:
        return services->guest_write(ctx, 0, (const uint8_t *)(UINTPTR_MAX - 2), 8);
    case DEED_FORGED: {
        struct vfio_mediate_call_context forged = *ctx;
        return services->mark_dirty(&forged, 0, 1);
    }
    case DEED_SCRATCH: {
        struct vfio_mediate_scratch scratch = { .struct_size = sizeof(scratch), .length = argument };
        return services->scratch_alloc(ctx, &scratch);
    }
    case DEED_SHORT_INFO: {
        struct vfio_mediate_region_info info = { .struct_size = 8, .size = 0x5a5a };
        int32_t status = services->default_region_info(ctx, &info);
        return info.size == 0x5a5a ? status : 1;
    }
    case DEED_BAD_IRQS: {
        int32_t fds[1] = { -7 };
        struct vfio_mediate_irq_request request = {
            .struct_size = sizeof(request), .count = 1, .action = VFIO_MEDIATE_IRQ_TRIGGER,
            .data_kind = VFIO_MEDIATE_IRQ_DATA_EVENTFD, .fds = fds };
        return services->default_set_irqs(ctx, &request);
    }
    case DEED_DEFAULT:
        return services->default_rw(ctx, access);
    case DEED_FILL:
        memset(access->data, (int)argument, access->length);
        return 0;
    case DEED_LOG: {
        struct vfio_mediate_bytes target = TEXT("scripted"), text = TEXT("said"), none = { NULL, 1 << 20 };
        services->log(VFIO_MEDIATE_LOG_INFO, target, text);
        services->log(12345, none, none);
        return 0;
    }
    case DEED_REQUEST:
        return services->request(ctx, (uint32_t)(argument >> 32), (uint32_t)argument);
    case DEED_TAMPER:
        access->data = NULL;
        access->length = UINT64_MAX;
        access->region = 77;
        access->offset = UINT64_MAX;
        return 0;
    default:
        return 0;
    }
}

static int32_t rw(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx,
                  struct vfio_mediate_access *access)
{
    struct script *script = ((struct device *)state)->script;

    (void)data;
    look(script);
    atomic_fetch_add(&script->accesses, 1);
    if (atomic_load(&script->deed) == DEED_KEEP_CONTEXT)
        atomic_store(&script->stale_context, (uint64_t)(uintptr_t)ctx);
    if (atomic_load(&script->deed) != DEED_USE_STALE)
        wait_at_gate(script);
    if (atomic_load(&script->deed))
        atomic_store(&script->deed_status, deed(script, ctx, access));
    return atomic_load(&script->rw_answer);
}

static int32_t fired(vfio_mediate_opaque state, vfio_mediate_opaque data, const struct vfio_mediate_call_context *ctx,
                     uint32_t index, uint32_t vector)
{
    (void)data;
    (void)ctx;
    look(((struct device *)state)->script);
    return index == 2 && vector < 3 ? VFIO_MEDIATE_VERDICT_HANDLED : -ERANGE;
}

static int32_t set_state(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, uint32_t from,
                         uint32_t to, uint32_t *actual)
{
    struct script *script = ((struct device *)state)->script;

    (void)ctx;
    (void)from;
    (void)to;
    *actual = atomic_load(&script->actual_state);
    return atomic_load(&script->set_state_answer);
}

static int32_t match_data(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, uint8_t *buffer,
                          size_t capacity, size_t *length)
{
    struct script *script = ((struct device *)state)->script;

    (void)ctx;
    memset(buffer, 7, capacity < 4 ? capacity : 4);
    *length = atomic_load(&script->save_length);
    return 0;
}

static int32_t check_match(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, const uint8_t *data,
                           size_t length, struct vfio_mediate_reason *reason)
{
    (void)state;
    (void)ctx;
    (void)data;
    if (length == 0)
        return 0;
    memcpy(reason->text, "other\nfirmware", 14);
    reason->length = length == 1 ? 14 : SIZE_MAX;
    return -EOPNOTSUPP;
}

static int32_t save(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, uint8_t *buffer,
                    size_t capacity, size_t *length)
{
    struct script *script = ((struct device *)state)->script;

    (void)ctx;
    (void)buffer;
    (void)capacity;
    *length = atomic_load(&script->save_length);
    return atomic_load(&script->save_answer);
}

static int32_t load(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, const uint8_t *data,
                    size_t length)
{
    (void)state;
    (void)ctx;
    (void)data;
    return length > 4 ? 5 : 0;
}

static int32_t dirty_start(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx,
                           const struct vfio_mediate_iova_range *ranges, size_t count, uint64_t page_size)
{
    (void)state;
    (void)ctx;
    (void)ranges;
    (void)page_size;
    return count ? 0 : -EINVAL;
}

// Dirties everything, and more.
static int32_t dirty_report(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx, uint64_t iova,
                            uint64_t length, uint64_t page_size, uint64_t *bitmap)
{
    (void)state;
    (void)ctx;
    (void)iova;
    for (uint64_t word = 0; word * 64 < length / page_size; word++)
        bitmap[word] = UINT64_MAX;
    return 0;
}

static void dirty_stop(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx)
{
    (void)state;
    (void)ctx;
}

static int32_t event(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx,
                     const struct vfio_mediate_event *event)
{
    (void)ctx;
    look(((struct device *)state)->script);
    return event->kind == VFIO_MEDIATE_EVENT_RESET_PREPARE ? -EBUSY : 3;
}

static void close_device(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx)
{
    struct device *device = state;

    (void)ctx;
    look(device->script);
    atomic_fetch_add(&device->script->closes, 1);
    free(device);
}

// Breaks one rule of the tables, by its number; false for a number that names none.
static int spoil(struct device *device, struct vfio_mediate_device_ops *ops, uint32_t which)
{
    struct vfio_mediate_region_claim *claim = &device->claims[0];
    static const struct vfio_mediate_region_hooks no_hooks = { .struct_size = sizeof(no_hooks) };

    switch (which) {
    case 0: break;
    case 1: claim->length = 0; break;
    case 2: claim->offset = UINT64_MAX; break;
    case 3: claim->region = 9; break;
    case 4: claim->maps = 0; break;
    case 5: claim->maps = 4; break;
    case 6: claim->hooks = NULL; break;
    case 7: claim->struct_size = 0; break;
    case 8: claim->struct_size = sizeof(*claim) + 8; break;
    case 9: device->claims[1].offset = claim->offset + claim->length - 1; break;
    case 10: ops->regions = NULL; break;
    case 11: ops->region_count = 1025; break;
    case 12: ops->regions = (const void *)((const char *)ops->regions + 1); break;
    case 13: device->irqs[0].index = 5; break;
    case 14: device->irqs[0].count = 0; break;
    case 15: device->irqs[0].start = UINT32_MAX; break;
    case 16: device->irqs[1].start = 2; break;
    case 17: device->irqs[0].hooks = NULL; break;
    case 18: device->extra.hooks = &no_hooks; break;
    case 19: device->extra.size = 0; break;
    case 20: device->extra.size = UINT64_MAX; break;
    case 21: device->extra.flags = 4; break;
    case 22: device->extra_irq.count = 0; break;
    case 23: device->extra_irq.count = UINT32_MAX; break;
    case 24: device->extra_irq.flags = 1u << 31; break;
    case 25: device->migration.flags = 0; break;
    case 26: device->migration.flags |= 1 << 9; break;
    case 27: device->migration.save = NULL; break;
    case 28: device->migration.struct_size = 0; break;
    case 29: device->dirty.exactness = 3; break;
    case 30: device->dirty.report = NULL; break;
    case 31: ops->extra_region_count = SIZE_MAX; break;
    default: return 0;
    }
    return 1;
}

static int32_t open_device(vfio_mediate_opaque state, const struct vfio_mediate_call_context *ctx,
                           const struct vfio_mediate_device_identity *identity, struct vfio_mediate_device_ops *ops)
{
    struct script *script = script_of(identity);
    struct device *device;

    (void)state;
    (void)ctx;
    look(script);
    atomic_fetch_add(&script->opens, 1);
    wait_at_gate(script);
    if (atomic_load(&script->open_answer))
        return atomic_load(&script->open_answer);
    device = calloc(1, sizeof(*device));
    if (!device)
        return -ENOMEM;
    device->script = script;
    device->hooks = (struct vfio_mediate_region_hooks){ .struct_size = sizeof(device->hooks), .rw = rw };
    device->irq_hooks = (struct vfio_mediate_irq_hooks){ .struct_size = sizeof(device->irq_hooks), .fired = fired };
    for (unsigned i = 0; i < 2; i++) {
        device->claims[i] = (struct vfio_mediate_region_claim){
            .struct_size = sizeof(device->claims[i]), .region = 0, .offset = 0x100 * i, .length = 0x100,
            .maps = VFIO_MEDIATE_MAP_NORMAL | VFIO_MEDIATE_MAP_TRACKING, .hooks = &device->hooks };
        device->irqs[i] = (struct vfio_mediate_irq_claim){
            .struct_size = sizeof(device->irqs[i]), .index = 2, .start = 3 * i, .count = 3, .hooks = &device->irq_hooks };
    }
    device->extra = (struct vfio_mediate_extra_region){
        .struct_size = sizeof(device->extra), .flags = 3, .size = 4096, .hooks = &device->hooks };
    device->extra_irq = (struct vfio_mediate_extra_irq){ .struct_size = sizeof(device->extra_irq), .flags = 1, .count = 1 };
    device->migration = (struct vfio_mediate_migration_ops){
        .struct_size = sizeof(device->migration), .flags = VFIO_MEDIATE_MIGRATION_STOP_COPY, .set_state = set_state,
        .match_data = match_data, .check_match = check_match, .save = save, .load = load };
    device->dirty = (struct vfio_mediate_dirty_ops){
        .struct_size = sizeof(device->dirty), .exactness = VFIO_MEDIATE_DIRTY_SUPERSET, .start = dirty_start,
        .report = dirty_report, .stop = dirty_stop };
    *ops = (struct vfio_mediate_device_ops){
        .struct_size = sizeof(*ops), .state = device,
        .regions = device->claims, .region_count = 2, .irqs = device->irqs, .irq_count = 2,
        .extra_regions = &device->extra, .extra_region_count = 1, .extra_irqs = &device->extra_irq, .extra_irq_count = 1,
        .migration = &device->migration, .dirty = &device->dirty, .event = event, .close = close_device };
    if (!spoil(device, ops, atomic_load(&script->spoiled)))
        abort();
    return 0;
}

static int32_t probe(vfio_mediate_opaque state, const struct vfio_mediate_device_identity *identity)
{
    struct script *script = script_of(identity);

    (void)state;
    look(script);
    atomic_store(&last, script);
    atomic_fetch_add(&script->probes, 1);
    return atomic_load(&script->probe_answer);
}

static int32_t init(const struct vfio_mediate_host_services *services, vfio_mediate_opaque *state)
{
    (void)services;
    (void)state;
#ifdef INIT_FIFO
    {
        // Begins when somebody opens the other end, goes on when that is closed.
        char byte;
        int fd = open(INIT_FIFO, O_RDONLY);
        while (read(fd, &byte, 1) > 0)
            ;
        close(fd);
    }
#endif
    return INIT_ANSWER;
}

static void retire(vfio_mediate_opaque state)
{
    struct script *script = atomic_load(&last);

    (void)state;
    if (script)
        atomic_fetch_add(&script->retires, 1);
    if (atomic_exchange(&retired, 1))
        abort();
}

#ifdef CONSTRUCTOR_FILE
__attribute__((constructor)) static void constructed(void)
{
    close(open(CONSTRUCTOR_FILE, O_CREAT | O_WRONLY, 0600));
}
#endif

static const struct vfio_mediate_device_match matches[] = {
    { VENDOR_ID, MATCH_DEVICE, VFIO_MEDIATE_ANY_ID, VFIO_MEDIATE_ANY_ID },
};

static const struct vfio_mediate_plugin plugin = {
    .struct_size = PLUGIN_SIZE,
    .name = TEXT(NAME),
    .version = TEXT(VERSION),
    .vendor = TEXT(VENDOR),
    .matches = matches,
    .match_count = MATCH_COUNT,
    .init = init,
    .probe = probe,
    .open = HAS_OPEN ? open_device : NULL,
    .retire = retire,
};

#ifdef RUST_HEADER_GARBAGE
static const uint64_t garbage[16] = { 0x2168746979617274, 3, 7, 9 };
#endif

#ifdef ENTRY_FUNCTION
void vfio_mediate_plugin(void);
void vfio_mediate_plugin(void)
{
}
void *keep(void);
void *keep(void)
{
    return (void *)&plugin;
}
#elif defined(ENTRY_SHORT)
const uint32_t vfio_mediate_plugin = ENTRY_SHORT;
const void *const keep = &plugin;
#elif defined(ENTRY_CUT)
// As an older entry may have been: it begins like ours, and ends early.
const struct { uint64_t magic; uint32_t size; uint16_t major, minor; } vfio_mediate_plugin = {
    MAGIC, ENTRY_SIZE, MAJOR, MINOR };
const void *const keep = &plugin;
#elif defined(ENTRY_HIDDEN)
__attribute__((visibility("hidden"))) extern const struct vfio_mediate_entry vfio_mediate_plugin;
const struct vfio_mediate_entry vfio_mediate_plugin = { .magic = MAGIC, .plugin = &plugin };
const void *const keep = &vfio_mediate_plugin;
#else
const struct vfio_mediate_entry vfio_mediate_plugin = {
    .magic = MAGIC,
    .struct_size = ENTRY_SIZE,
    .abi_major = MAJOR,
    .abi_minor = MINOR,
    .fingerprint = FINGERPRINT,
    .flags = FLAGS,
#ifdef RUST_HEADER_GARBAGE
    .rust_header = garbage,
#endif
#ifndef NO_PLUGIN
    .plugin = &plugin,
#endif
};
#ifdef NO_PLUGIN
const void *const keep = &plugin;
#endif
#endif
