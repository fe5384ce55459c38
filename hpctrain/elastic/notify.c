/* Preloaded into the processes of a Slurm step, so that the loss of one does not end all.
 *
 * When Open MPI finds a process lost it tells the PMIx server of its host, by an event of status
 * PMIX_ERR_PROC_TERM_WO_SYNC. A server of Slurm's plugin mpi/pmix takes every such event for an
 * order to cancel the step. This keeps that one event, and passes on everything else.
 *
 * PMIx_Notify_event: https://pmix.github.io/standard
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#define ERR_PROC_TERM_WO_SYNC (-200)
#define OPERATION_SUCCEEDED (-157)
#define ERR_NOT_SUPPORTED (-47)

typedef int (*notify)(int, const void *, unsigned char, void *, size_t, void *, void *);

int PMIx_Notify_event(int status, const void *source, unsigned char range, void *info,
                      size_t infos, void *done, void *data)
{
    static notify real;

    if (status == ERR_PROC_TERM_WO_SYNC)
        return OPERATION_SUCCEEDED;
    if (real == NULL) {
        /* The library was loaded for Open MPI alone: RTLD_NEXT would not find it. */
        void *library = dlopen("libpmix.so.2", RTLD_LAZY | RTLD_NOLOAD);
        if (library != NULL)
            real = (notify)dlsym(library, "PMIx_Notify_event");
    }
    return real == NULL ? ERR_NOT_SUPPORTED : real(status, source, range, info, infos, done, data);
}
