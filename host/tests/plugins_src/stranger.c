// A shared library that is nobody's plug-in.
// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

int stranger(int number);

int stranger(int number)
{
    return number + 1;
}

#ifdef PROGRAM
int main(void)
{
    return stranger(-1);
}
#endif

#ifdef MISSING
int nobody_defines_this(void);

int vfio_mediate_plugin_user(void);
int vfio_mediate_plugin_user(void)
{
    return nobody_defines_this();
}

const struct { unsigned long long magic; unsigned words[16]; } vfio_mediate_plugin = { 0x3144454d4f494656ull, { 0 } };
#endif

#ifdef CONSTRUCTOR_FILE
#include <fcntl.h>
#include <unistd.h>

__attribute__((constructor)) static void constructed(void)
{
    close(open(CONSTRUCTOR_FILE, O_CREAT | O_WRONLY, 0600));
}
#endif
